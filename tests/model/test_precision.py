"""Half precision: the reversible network against plain autograd, both against fp32, and modules in half altogether."""
import logging

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from benchmarks.half_precision import autocast_alone
from model import IDM, BlockCompressedSensing
from model.precision import FullPrecisionConv2d
from model.schedules import LearnedSchedule
from tests.conftest import ROOT
from utils.data.testsets import load_testset

HALVES = [torch.bfloat16, torch.float16]
LOSS_SCALE = 4096  # else fp16 loses the smallest gradients


def photographs(side: int) -> Tensor:
    """(2, 1, side, side), from the middle of two of scikit-image's."""
    middle = np.s_[128 - side // 2:128 + side // 2]
    crops = [picture.luminance[middle, middle] for picture in load_testset("Samples")[2:4]]
    return torch.from_numpy(np.stack(crops))[:, None].float() / 255


def gradient(
    net: IDM,
    operator: BlockCompressedSensing,
    x: Tensor,
    half: torch.dtype | None = None,  # None: fp32
    signs: Tensor | None = None,  # of x̂ − x; None: as they come out
) -> tuple[Tensor, Tensor]:
    """x̂ − x, and the gradient of mean |x̂ − x| in all parameters, as one vector in float64."""
    with torch.autocast("cpu", half or torch.bfloat16, enabled=half is not None):
        error = net(operator.A(x), operator) - x
    loss = ((error.sign() if signs is None else signs).detach() * error).mean()
    gradients = torch.autograd.grad(LOSS_SCALE * loss, list(net.parameters()))
    return error.detach(), torch.cat([gradient.flatten() for gradient in gradients]).double()


def cosine(a: Tensor, b: Tensor) -> float:
    return float(a @ b / (a.norm() * b.norm()))


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("half", HALVES)
def test_reversible_differs_from_plain_by_less_than_half_precision_itself(half: torch.dtype):
    torch.manual_seed(0)
    net = IDM((32, 64), 6, shuffle=4, num_attention_heads=2)
    x = photographs(32)
    operator = BlockCompressedSensing.random((32, 32), 0.25, 16, torch.Generator().manual_seed(0))
    _, reversible = gradient(net, operator, x, half)
    net.invertible = "none"
    error, exact = gradient(net, operator, x)
    _, rounded = gradient(net, operator, x, half, error.sign())
    _, plain = gradient(net, operator, x, half)
    assert distance(reversible, plain) < distance(rounded, exact)


@pytest.mark.parametrize(("half", "least"), [(torch.bfloat16, 0.999), (torch.float16, 0.9995)])
def test_half_precision_against_fp32(half: torch.dtype, least: float):
    """With fp32's signs of x̂ − x: in a picture this small, a handful of flipped ones would drown the arithmetic.

    The gradients of four operators in one vector: where those of the two pictures cancel, a single one may lie far off.
    In bf16 ours is at 0.16 of what autocast alone does.
    """
    net = IDM.from_checkpoint(ROOT / "weight" / "compact")
    net.invertible = "none"
    x, gradients = photographs(32), []
    for seed in range(4):
        operator = BlockCompressedSensing.random((32, 32), 0.1, 32, torch.Generator().manual_seed(seed))
        error, exact = gradient(net, operator, x)
        _, rounded = gradient(net, operator, x, half, error.sign())
        with autocast_alone(net):  # conv_in, conv_out and the injectors' maps in half as well
            gradients.append((exact, rounded, gradient(net, operator, x, half, error.sign())[1]))
    exact, rounded, careless = map(torch.cat, zip(*gradients, strict=True))
    assert cosine(rounded, exact) > least
    assert distance(rounded, exact) < 0.8 * distance(careless, exact)


def test_full_precision_convolution():
    conv, x = FullPrecisionConv2d(3, 4, kernel_size=3), torch.randn(2, 3, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        ours = conv(x)
    assert torch.equal(ours, nn.functional.conv2d(x, conv.weight, conv.bias))


@pytest.mark.parametrize(("half", "most"), [(torch.bfloat16, 0.1), (torch.float16, 0.01)])
def test_weights_in_half(half: torch.dtype, most: float, caplog: pytest.LogCaptureFixture):
    """A network cast as a whole, with its operator left in fp32; the α's, one of which bf16 rounds to 1, stay."""
    net = IDM.from_checkpoint(ROOT / "weight" / "compact")
    x = photographs(32)
    operator = BlockCompressedSensing.random((32, 32), 0.1, 32, torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = net(operator.A(x), operator)
        logging.getLogger("diffusers").propagate = True
        alpha_bar = net.schedule(x)
        net.to(half)
        assert torch.equal(net.schedule(x), alpha_bar) and net.unet.conv_in.weight.dtype == half
        x_hat = net(operator.A(x), operator)
    assert float((x_hat - expected).norm() / (expected - x).norm()) < most
    assert not caplog.records


def test_schedule_in_half():
    """Products of alphas that are half-precision numbers are not rounded on the way."""
    schedule = LearnedSchedule(3)
    with torch.no_grad():
        schedule.alpha.copy_(torch.tensor([0.57, 0.55, 0.83]))
    schedule.alpha = nn.Parameter(schedule.alpha.detach().bfloat16())
    expected = schedule.alpha.detach().double().cumprod(0)
    assert torch.allclose(schedule()[0, 1:].double(), expected, rtol=1e-6, atol=0)
