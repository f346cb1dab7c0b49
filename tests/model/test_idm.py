"""The whole network against the golden cases, its memory, and its independence of any global state."""
import threading

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from benchmarks.training_step import kept_bytes
from model import IDM, BlockCompressedSensing, LinearOperator
from model.idm import INVERTIBLE
from model.injector import Injector
from model.schedules import LearnedSchedule
from tests.conftest import DEVICES, Golden


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("store_every", [1, None])
@pytest.mark.parametrize("invertible", INVERTIBLE)
def test_golden(golden: Golden, invertible: str, store_every: int | None, device: str):
    net, operator, x = golden.network().to(device), golden.operator().to(device), golden.x.to(device)
    net.invertible, net.store_every = invertible, store_every
    y = operator.A(x)
    assert (y.cpu() - golden.y).abs().max() <= 1e-5
    x_hat = net(y, operator)
    assert (x_hat.cpu() - golden.x_hat).abs().max() <= 1e-4
    loss = (x_hat - x).abs().mean()
    assert abs(loss.item() - golden.loss) <= 1e-6
    loss.backward()
    errors = golden.gradient_errors(net)
    assert len(errors) > 1000 * (golden.name == "narrow_T3")
    worst = max(errors, key=errors.get)
    assert errors[worst] <= 0.01, worst


def test_golden_unet(golden: Golden):
    net, operator = golden.network(), golden.operator()
    with torch.inference_mode():
        noise = net.unet(golden.unet_in, operator.A_adjoint(golden.y), operator, golden.meta["num_steps"])
    assert (noise - golden.unet_out).abs().max() <= 1e-4


def test_two_models_in_two_threads():
    """Different widths, steps and operators at once, forward and backward, several times over."""
    failures: list[str] = []

    def work(golden: Golden) -> None:
        net, operator = golden.network(), golden.operator()
        for _ in range(3):
            net.zero_grad()
            x_hat = net(golden.y, operator)
            (x_hat - golden.x).abs().mean().backward()
            if (x_hat - golden.x_hat).abs().max() > 1e-4:
                failures.append(f"{golden.name}: output")
            if max(golden.gradient_errors(net).values()) > 0.01:
                failures.append(f"{golden.name}: gradients")

    threads = [threading.Thread(target=work, args=(Golden(name),)) for name in ("narrow_T3", "wide_T2_rect")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def kept(net: IDM, side: int) -> int:
    operator = BlockCompressedSensing.random((side, side), 0.25, 16, torch.Generator().manual_seed(0))
    return kept_bytes(net, operator, torch.rand(1, 1, side, side))


def test_memory_grows_by_the_stored_images_alone():
    """T = 6 against T = 2 (with one step alone, streams that go in and that come out are partly the same)."""
    image, scalars = 64 * 64 * 4, 8 * 4
    few, many = IDM((32, 64), 2), IDM((32, 64), 6)
    assert kept(many, 64) - kept(few, 64) <= 4 * (image + scalars)
    few.store_every = many.store_every = None
    assert kept(many, 64) - kept(few, 64) <= 4 * scalars  # pure inversion does not grow at all


def test_memory_is_under_a_tenth_of_plain_autograd():
    net = IDM((32, 64), 3)
    both = kept(net, 128)
    net.invertible = "none"
    assert both < kept(net, 128) / 10


def test_up_block_chain_inverts():
    """Stated figure: over the up block's 11 couplings, streams come back to 5e-4 in fp32 (measured: 2.4e-4)."""
    golden = Golden("narrow_T3")
    for dtype, bound in ((torch.float32, 5e-4), (torch.float64, 1e-12)):
        net, operator = golden.network().to(dtype), golden.operator().to(dtype)
        chain = net.unet.up_blocks[1].chain
        torch.manual_seed(0)
        x1, x2, *skips = (torch.randn(2, 32, 32, 32, dtype=dtype) for _ in range(4))
        injection = (pixel_unshuffle(operator.A_adjoint(golden.y.to(dtype)), 2), operator, 1)
        attention = [injection, (), injection]
        contexts = [*attention, (skips[0],), *attention, (skips[1],), *attention]
        with torch.no_grad():
            back = chain.inverse(*chain(x1, x2, contexts), contexts)
        assert max(float((b - a).norm() / a.norm()) for a, b in zip((x1, x2), back, strict=True)) <= bound


def test_gradients_at_any_depth_and_shuffle():
    """T = 6 and shuffle 4: "both" against plain autograd in float64."""
    torch.manual_seed(0)
    net = IDM((32, 64), 6, shuffle=4, num_attention_heads=2).double()
    operator = BlockCompressedSensing.random((32, 32), 0.25, 16, torch.Generator().manual_seed(0)).double()
    y = operator.A(torch.rand(1, 1, 32, 32, dtype=torch.float64)).requires_grad_()
    inputs = [y, *net.parameters()]
    gradients = []
    for net.invertible in ("none", "both"):
        gradients.append(torch.autograd.grad(net(y, operator).abs().mean(), inputs, allow_unused=True))
    rounding = 1e-15 * sum(gradient.norm() ** 2 for gradient in gradients[0]) ** 0.5  # of gradients that are zero
    for plain, ours in zip(*gradients, strict=True):
        assert (ours - plain).norm() <= 1e-9 * plain.norm() + rounding


def test_gradients_where_a_batch_is_differentiated_in_parts(monkeypatch):
    """Three images, two at once, then one: against plain autograd in float64."""
    monkeypatch.setattr("model.idm.PIXELS_AT_ONCE", 2 * 16 * 16)
    torch.manual_seed(0)
    net = IDM((32, 64), 2).double()
    operator = BlockCompressedSensing.random((32, 32), 0.25, 16, torch.Generator().manual_seed(0)).double()
    y = operator.A(torch.rand(3, 1, 32, 32, dtype=torch.float64)).requires_grad_()
    inputs, batches = [y, *net.parameters()], []
    net.unet.conv_in.register_forward_hook(lambda module, args, out: batches.append(len(out)))
    gradients = []
    for net.invertible in ("none", "both", "sampling", "unet"):
        batches.clear()
        gradients.append(torch.autograd.grad(net(y, operator).abs().mean(), inputs, allow_unused=True))
        # Two at once; the last step of the last part is not computed again.
        again = [] if net.invertible == "unet" else [1, 2, 2]
        assert batches == ([3, 3] if net.invertible == "none" else [2, 2, 1, 1, *again])
    rounding = 1e-15 * sum(gradient.norm() ** 2 for gradient in gradients[0]) ** 0.5  # of gradients that are zero
    for plain, *ours in zip(*gradients, strict=True):
        assert all((gradient - plain).norm() <= 1e-9 * plain.norm() + rounding for gradient in ours)


def test_a_batch_whose_images_are_measured_differently_is_not_taken_apart(monkeypatch):
    monkeypatch.setattr("model.idm.PIXELS_AT_ONCE", 16 * 16)
    torch.manual_seed(0)
    net = IDM((32, 64), 1).double()
    phi = BlockCompressedSensing.random((32, 32), 0.25, 16, torch.Generator().manual_seed(0)).sampling_matrix.double()
    operator = BlockCompressedSensing(phi, torch.stack([torch.randperm(1024) for _ in range(2)]), (32, 32))
    y = operator.A(torch.rand(2, 1, 32, 32, dtype=torch.float64)).requires_grad_()
    gradients = []
    for net.invertible in ("none", "both"):
        gradients.append(torch.autograd.grad(net(y, operator).abs().mean(), y)[0])
    assert (gradients[1] - gradients[0]).norm() <= 1e-9 * gradients[0].norm()


def perturbed(num_steps: int, v: float) -> tuple[IDM, BlockCompressedSensing, Tensor]:
    """A network away from its initial weights, all of its v the same; an operator; and a measurement of one image."""
    torch.manual_seed(0)
    net = IDM((32, 64), num_steps, num_attention_heads=2)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if name.endswith(".v"):
                parameter.fill_(v)
            else:
                parameter += 0.1 * parameter.std(correction=0).clamp_min(0.1) * torch.randn_like(parameter)
    operator = BlockCompressedSensing.random((32, 32), 0.25, 16, torch.Generator().manual_seed(0))
    return net, operator, operator.A(torch.rand(1, 1, 32, 32))


def all_gradients(net: IDM, operator: LinearOperator, y: Tensor) -> Tensor:
    net.zero_grad()
    net(y, operator).float().square().mean().backward()
    gradients = [parameter.grad for parameter in net.parameters() if parameter.grad is not None]
    return torch.cat([gradient.flatten() for gradient in gradients]).double()


@pytest.mark.parametrize(("v", "num_steps"), [*((v, 3) for v in (1, 0.5, 0.2, 0.1, 0.05, 0.01, 0)), (0.1, 6), (0, 6)])
def test_both_levels_are_exact_at_every_v(v: float, num_steps: int):
    net, operator, y = perturbed(num_steps, v)
    gradients = [all_gradients(net, operator, y) for net.invertible in ("none", "both")]
    assert (gradients[1] - gradients[0]).norm() <= 1e-5 * gradients[0].norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_plain_autograds_in_the_same_precision(dtype: torch.dtype):
    net, operator, y = perturbed(6, 0.5)
    with torch.autocast("cpu", dtype):
        gradients = [all_gradients(net, operator, y) for net.invertible in ("none", "both")]
    assert torch.cosine_similarity(*gradients, dim=0) >= 0.99999


def test_inverting_both_levels_as_published_is_off_where_v_is_small():
    net, operator, y = perturbed(2, 0.1)
    exact = all_gradients(net, operator, y)
    net.store_every = None
    with pytest.warns(UserWarning, match="product of 1/v exceeds what the precision bears"):
        inverted = all_gradients(net, operator, y)
    assert (inverted - exact).norm() > 1e-3 * exact.norm()


class Masked(LinearOperator):
    """y = w x, pixel by pixel, with w a learned parameter, or a buffer with a gradient."""

    def __init__(self, as_buffer: bool):
        super().__init__()
        weight = torch.linspace(0.5, 1, 32 * 32, dtype=torch.float64).view(32, 32)
        if as_buffer:
            self.register_buffer("weight", weight.requires_grad_())
        else:
            self.weight = torch.nn.Parameter(weight)

    def A(self, x: Tensor) -> Tensor:
        return self.weight * x

    def A_adjoint(self, y: Tensor) -> Tensor:
        return self.weight * y


def learned_sampling_matrix() -> BlockCompressedSensing:
    operator = BlockCompressedSensing.random((32, 32), 0.25, 16, torch.Generator().manual_seed(0))
    phi = torch.nn.Parameter(operator.sampling_matrix.double())
    return BlockCompressedSensing(phi, operator.permutation, (32, 32))


@pytest.mark.parametrize(("operator", "name"), [
    (Masked(as_buffer=False), "weight"), (Masked(as_buffer=True), "weight"),
    (learned_sampling_matrix(), "sampling_matrix")])
def test_learned_operator(operator: LinearOperator, name: str):
    """What an operator learns is differentiated too, to the same numbers with and without inversion."""
    torch.manual_seed(0)
    net, learned = IDM((32, 64), 2, shuffle=4).double(), getattr(operator, name)
    y = operator.A(torch.rand(1, 1, 32, 32, dtype=torch.float64)).detach()
    gradients = []
    for net.invertible in INVERTIBLE:
        gradients.append(torch.autograd.grad(net(y, operator).abs().mean(), learned)[0])
    assert all((ours - gradients[-1]).norm() <= 1e-9 * gradients[-1].norm() for ours in gradients)


def test_no_anomaly_in_fresh_weights():
    """No derivative along the way is nan, not even one that a zero hides afterwards."""
    net = IDM.compact(32, num_steps=2)
    operator = BlockCompressedSensing.random((32, 32), 0.25, 16, torch.Generator().manual_seed(0))
    with torch.autograd.detect_anomaly(check_nan=True):
        for net.invertible in INVERTIBLE:
            net(operator.A(torch.rand(1, 1, 32, 32)), operator).abs().mean().backward()


def test_injector_equals_its_definition():
    torch.manual_seed(0)
    injector = Injector(channels=8, factor=2, num_steps=2)
    operator = BlockCompressedSensing.random((8, 8), 0.5, 4, torch.Generator().manual_seed(0))
    features, back_projection = torch.randn(1, 8, 4, 4), torch.randn(1, 1, 8, 8)
    ours = injector(features, pixel_unshuffle(back_projection, 2), operator, step=2)
    # Each pixel of the image is one place of the features and 2 of the 8 channels: c = 4 k + 2 (i mod 2) + (j mod 2).
    lift, unlift = injector.lift[1], injector.unlift[1]
    z = torch.zeros(8, 8)
    channels = {(i, j): [4 * k + 2 * (i % 2) + j % 2 for k in range(2)] for i in range(8) for j in range(8)}
    for (i, j), c in channels.items():
        z[i, j] = lift.weight[0, :, 0, 0] @ features[0, c, i // 2, j // 2] + lift.bias[0]
    consistent = operator.A_adjoint(operator.A(z[None, None]))[0, 0]
    expected = features.clone()
    for (i, j), c in channels.items():
        pixel = torch.stack((z[i, j], consistent[i, j], back_projection[0, 0, i, j]))
        expected[0, c, i // 2, j // 2] += unlift.weight[:, :, 0, 0] @ pixel + unlift.bias
    assert torch.allclose(ours, expected, atol=1e-5)
    layout = {"memory_format": torch.channels_last}  # test.py's
    folded = pixel_unshuffle(back_projection, 2)
    assert torch.allclose(injector.to(**layout)(features.contiguous(**layout), folded, operator, 2), ours, atol=1e-6)


def test_schedule():
    schedule = LearnedSchedule(3)
    with torch.no_grad():
        schedule.alpha.copy_(torch.tensor([0.5, 0.4, 0.25]))
    assert torch.allclose(schedule(), torch.tensor([[1, 0.5, 0.2, 0.05]]))


@pytest.mark.parametrize(("arguments", "message"), [
    ({"block_out_channels": (48, 96)}, "multiples of the 32 groups"),
    ({"block_out_channels": (32, 64), "num_attention_heads": 5}, "of the 5 heads"),
    ({"block_out_channels": (32,)}, "two widths"),
    ({"block_out_channels": (32, 64), "num_steps": 0}, "num_steps must be at least 1"),
    ({"block_out_channels": (32, 64), "shuffle": 8}, "must be a multiple of 64"),
])
def test_impossible_architectures(arguments, message):
    with pytest.raises(ValueError, match=message):
        IDM(**arguments)


def test_wrong_use():
    net = IDM((32, 64), 1)
    with pytest.raises(ValueError, match="invertible must be one of both, sampling, unet, none, auto, not 'all'"):
        net.invertible = "all"
    with pytest.raises(ValueError, match="store_every must be None or at least 1, not 0"):
        net.store_every = 0


class Dense(LinearOperator):
    """A matrix (measurements, pixels) of images of (H, W)."""

    def __init__(self, matrix: Tensor, image_shape: tuple[int, int]):
        super().__init__()
        self.matrix, self.image_shape = matrix, image_shape

    def A(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.matrix.T

    def A_adjoint(self, y: Tensor) -> Tensor:
        return (y @ self.matrix).view(len(y), 1, *self.image_shape)


def test_images_of_any_size_are_padded_inside_and_nothing_more_is_measured():
    """As the network on the padded image, of which a matrix with columns of zeros measures the image alone."""
    torch.manual_seed(0)
    net, x = IDM((32, 64), 2), torch.rand(2, 1, 5, 12)
    operator = BlockCompressedSensing.random((5, 12), 0.5, 2, torch.Generator().manual_seed(0))
    pixels = torch.eye(60).view(60, 1, 5, 12)
    matrix = operator.A(pixels).flatten(1).T
    wide = torch.zeros(len(matrix), 8, 12)
    wide[:, :5] = matrix.view(-1, 5, 12)
    expected = net(Dense(wide.flatten(1), (8, 12)).A(torch.nn.functional.pad(x, (0, 0, 0, 3))),
                   Dense(wide.flatten(1), (8, 12)))[..., :5, :]
    found = net(operator.A(x), operator)
    assert found.shape == x.shape and (found - expected).abs().max() <= 1e-5
    expected, found = (torch.autograd.grad((x_hat - x).square().mean(), net.input_scale)[0]
                       for x_hat in (expected, found))
    assert found == pytest.approx(expected, rel=1e-4) and expected.abs() > 1e-4


def test_compact_start():
    """From the beginning an injector makes the image that x̂_t and ε stand for agree with the measurement."""
    torch.manual_seed(0)
    net = IDM.compact()
    operator = BlockCompressedSensing.random((64, 64), 0.3, 32, torch.Generator().manual_seed(0))
    x = torch.rand(1, 1, 64, 64)
    y = operator.A(x)
    back_projection = operator.A_adjoint(y)
    with torch.no_grad():
        assert float((net(y, operator) - back_projection).norm() / back_projection.norm()) < 0.01
        (alpha_bar,) = net.schedule()
        for step in (1, 2, 3):
            noisy, noise = torch.randn(2, 1, 1, 64, 64)
            features = pixel_unshuffle(torch.cat((2 * noisy, noise, -noise, torch.zeros_like(noise)), dim=1), 4)
            injector = net.unet.up_blocks[1].chain[0].body
            noise = pixel_shuffle(injector(features, pixel_unshuffle(back_projection, 4), operator, step), 4)[:, 1:2]
            estimate = (noisy - (1 - alpha_bar[step]).sqrt() * noise) / alpha_bar[step].sqrt()
            assert torch.allclose(operator.A(estimate), y, atol=1e-4)


@pytest.mark.parametrize("num_steps", [1, 2])
def test_schedule_beyond_one(num_steps: int):
    """Training may bring alphas past 1; the network and its gradients stay finite."""
    net = IDM.compact(32, num_steps)
    torch.nn.init.constant_(net.schedule.alpha, 1.01)
    operator = BlockCompressedSensing.random((32, 32), 0.3, 16, torch.Generator().manual_seed(0))
    x = torch.rand(1, 1, 32, 32)
    (net(operator.A(x), operator) - x).abs().mean().backward()
    assert all(parameter.grad.isfinite().all() for parameter in net.parameters())
    assert net.schedule.alpha.grad.abs().min() > 0  # they can come back


@pytest.mark.parametrize("invertible", INVERTIBLE)
def test_a_functional_call_has_its_own_gradients(invertible: str):
    """Against the same call in plain autograd, with the attentions' weights replaced by frozen ones."""
    torch.manual_seed(0)
    net = IDM((32, 64), 2, shuffle=4).double()
    operator = BlockCompressedSensing.random((32, 32), 0.25, 16, torch.Generator().manual_seed(0)).double()
    y = operator.A(torch.rand(1, 1, 32, 32, dtype=torch.float64))
    others = {name: (p + 0.05 * torch.randn_like(p)).detach().requires_grad_("attn" not in name)
              for name, p in net.named_parameters()}
    learned = [other for other in others.values() if other.requires_grad]
    found = []
    for net.invertible in (invertible, "none"):
        loss = torch.func.functional_call(net, others, (y, operator)).abs().mean()
        found.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, learned, materialize_grads=True)]))
    assert (found[0] - found[1]).norm() <= 1e-9 * found[1].norm()


def test_a_learned_sampling_matrix_can_be_kept_orthonormal():
    """As README advises: with torch's parametrization, A Aᵀ = I at every step, and gradients are plain autograd's."""
    torch.manual_seed(0)
    net, operator = IDM((32, 64), 2, shuffle=4).double(), learned_sampling_matrix()
    torch.nn.utils.parametrizations.orthogonal(operator, "sampling_matrix")
    x = torch.rand(1, 1, 32, 32, dtype=torch.float64)
    optimizer = torch.optim.Adam(operator.parameters(), lr=1e-2)
    start = operator.sampling_matrix.detach()
    for _ in range(3):
        gradients = []
        for net.invertible in ("none", "both"):
            optimizer.zero_grad()
            (net(operator.A(x), operator) - x).abs().mean().backward()
            gradients += [parameter.grad.clone() for parameter in operator.parameters()]
        assert (gradients[1] - gradients[0]).norm() <= 1e-9 * gradients[0].norm() > 0
        optimizer.step()
    phi = operator.sampling_matrix
    assert (phi - start).norm() > 1e-3
    assert torch.allclose(phi.T @ phi, torch.eye(phi.shape[1], dtype=phi.dtype), atol=1e-12)
