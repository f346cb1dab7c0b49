"""The baseline of benchmarks/training_step.py is what it says: the same gradients, by way of five walks down a step."""
import torch

from benchmarks.published_step import published
from model import IDM, BlockCompressedSensing
from model.reversible import ReversibleChain


def test_the_published_way_gives_the_same_gradients_with_a_walk_down_for_every_skip():
    torch.manual_seed(0)
    net = IDM((32, 64), 2).double()
    with torch.no_grad():
        for parameter in net.parameters():  # none keeps an initial value that hides something
            parameter += (0.2 if parameter.numel() <= 3 else 0.03) * (2 * torch.rand_like(parameter) - 1)
    operator = BlockCompressedSensing.random((32, 32), 0.25, 16, torch.Generator().manual_seed(0)).double()
    x = torch.rand(2, 1, 32, 32, dtype=torch.float64)
    walks = []
    net.unet.conv_in.register_full_backward_hook(lambda *_: walks.append(1))

    def gradients() -> list[torch.Tensor]:
        net.zero_grad()
        walks.clear()
        (net(operator.A(x), operator) - x).abs().mean().backward()
        return [parameter.grad.clone() for parameter in net.parameters()]

    net.invertible = "none"
    plain = gradients()
    assert len(walks) == 2  # one a step
    with published(net):
        theirs = gradients()
    assert len(walks) == 2 * 5  # one more for each of the four skips that go into a chain
    rounding = 1e-15 * sum(gradient.norm() ** 2 for gradient in plain) ** 0.5  # of gradients that are zero
    assert all((a - b).norm() <= 1e-9 * b.norm() + rounding for a, b in zip(theirs, plain, strict=True))
    assert net.invertible == "none"
    assert not any("forward" in vars(part) for part in net.modules() if isinstance(part, ReversibleChain))
