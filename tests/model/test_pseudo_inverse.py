"""A⁺ and its damped form against dense linear algebra and its autograd in float64, and the network that uses them."""
import math
import warnings

import pytest
import torch
from torch import Tensor, nn

from model import IDM, BlockCompressedSensing, LinearOperator, OperatorError, check_operator
from model.idm import INVERTIBLE, SamplingStep
from model.operators import OPERATORS, dagger
from model.operators.pseudo_inverse import Way, way_of

SHAPE = (3, 4)  # of the images of the dense operators


class Dense(LinearOperator):
    """y = M x, M (measurements, pixels), a parameter or a buffer."""

    def __init__(self, matrix: Tensor, image_shape: tuple[int, int] = SHAPE):
        super().__init__()
        self.image_shape = image_shape
        if isinstance(matrix, nn.Parameter):
            self.matrix = matrix
        else:
            self.register_buffer("matrix", matrix)

    def A(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.matrix.T

    def A_adjoint(self, y: Tensor) -> Tensor:
        return (y @ self.matrix).view(len(y), 1, *self.image_shape)


def matrix(rows: int, rank: int, pixels: int = 12) -> Tensor:
    """Singular values from 1 to 2."""
    generator = torch.Generator().manual_seed(0)
    u, _ = torch.linalg.qr(torch.randn(rows, rank, generator=generator, dtype=torch.float64))
    v, _ = torch.linalg.qr(torch.randn(pixels, rank, generator=generator, dtype=torch.float64))
    return u @ torch.diag(torch.linspace(1, 2, rank, dtype=torch.float64)) @ v.T


def dense_solution(m: Tensor, y: Tensor, damping: Tensor | None) -> Tensor:
    if damping is None:
        return y @ torch.linalg.pinv(m).T
    eye = torch.eye(len(m), dtype=m.dtype)
    return torch.stack([m.T @ torch.linalg.solve(m @ m.T + lam * eye, each)
                        for lam, each in zip(damping.expand(len(y)), y, strict=True)])


RANKS = [(5, 5), (20, 12), (8, 6)]  # wide, tall, and of less rank than either
CASES = [(rank, damping) for rank in RANKS for damping in (None, (0.2,), (0.3, 0.1, 1.0))] + [((5, 5), (0.3, 0.0, 1.0))]


@pytest.mark.parametrize(("shape", "damping"), CASES)
def test_solution_and_its_gradients(shape: tuple[int, int], damping: tuple[float, ...] | None):
    """With measurements that A cannot make among them, since pictures with noise have such."""
    torch.manual_seed(0)
    rows, rank = shape
    m = nn.Parameter(matrix(rows, rank))
    y = torch.randn(3, rows, dtype=torch.float64, requires_grad=True)
    lam = None if damping is None else torch.tensor(damping, dtype=torch.float64, requires_grad=True)
    inputs, weights = [each for each in (y, lam, m) if each is not None], torch.randn(3, 12, dtype=torch.float64)
    ours, expected = Dense(m).A_dagger(y, lam).flatten(1), dense_solution(m, y, lam)
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-10)
    expected = torch.autograd.grad((expected * weights).sum(), inputs)
    for a, b in zip(torch.autograd.grad((ours * weights).sum(), inputs), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-8)
    frozen = Dense(m.detach()).A_dagger(y, lam).flatten(1)
    for a, b in zip(torch.autograd.grad((frozen * weights).sum(), inputs[:-1]), expected, strict=False):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-8)


def test_no_damping_is_the_limit_of_damping():
    m, y = matrix(8, 6), torch.randn(2, 8, dtype=torch.float64)
    both = Dense(m).A_dagger(y, torch.tensor([0.0, 0.5], dtype=torch.float64)).flatten(1)
    torch.testing.assert_close(both[:1], y[:1] @ torch.linalg.pinv(m).T)
    torch.testing.assert_close(both[1:], dense_solution(m, y[1:], torch.tensor([0.5], dtype=torch.float64)))


def test_an_image_is_solved_for_as_if_it_were_alone():
    operator, y = Dense(matrix(8, 6)), torch.randn(3, 8, dtype=torch.float64)
    y[1] *= 1e-3
    y[2] = 0
    together = operator.A_dagger(y)
    torch.testing.assert_close(together, torch.cat([operator.A_dagger(each) for each in y.split(1)]), rtol=1e-13,
                               atol=1e-18)
    assert together[2].count_nonzero() == 0


def test_an_ill_conditioned_operator_is_told_of():
    steep = Dense(torch.diag(torch.logspace(0, -7, 12, dtype=torch.float64)))
    steep.max_iterations = 5
    with pytest.warns(UserWarning, match="stopped after 5 iterations"):
        steep.A_dagger(torch.ones(1, 12, dtype=torch.float64))


def test_an_operator_that_changed_is_refused_in_backward():
    m, y = matrix(5, 5), torch.randn(1, 5, dtype=torch.float64, requires_grad=True)
    operator = Dense(m.clone())
    for change in (lambda: operator.matrix.mul_(2), lambda: operator.register_buffer("matrix", 2 * operator.matrix)):
        x = operator.A_dagger(y)
        change()
        with pytest.raises(RuntimeError, match="Dense has been changed between A_dagger and its gradient"):
            x.sum().backward()
    (first,) = torch.autograd.grad(operator.A_dagger(y).square().sum(), y, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), y)
    inverse = torch.linalg.pinv(operator.matrix)
    torch.testing.assert_close(second, (2 * inverse.T @ inverse).sum(1)[None])
    operator = Dense(nn.Parameter(m))
    with pytest.raises(RuntimeError, match="no second derivatives"):
        torch.autograd.grad(operator.A_dagger(y).sum(), y, create_graph=True)


def test_a_sampling_matrix_that_is_not_orthonormal():
    phi = torch.randn(16, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    orthonormal, _ = torch.linalg.qr(phi)
    permutation = torch.randperm(32, generator=torch.Generator().manual_seed(0))
    operator = BlockCompressedSensing(phi, permutation, (4, 8))
    x = torch.randn(2, 1, 4, 8, dtype=torch.float64)
    tight = BlockCompressedSensing(orthonormal, permutation, (4, 8))
    assert tight.tight and not operator.tight
    torch.testing.assert_close(operator.A_dagger(operator.A(x)), tight.A_adjoint(tight.A(x)))
    learned = BlockCompressedSensing(nn.Parameter(phi), permutation, (4, 8))
    torch.nn.utils.parametrizations.orthogonal(learned, "sampling_matrix")
    assert learned.tight
    with pytest.raises(ValueError, match="each of 0, …, 31 once; 31 are amiss"):
        BlockCompressedSensing(phi, torch.zeros(32, dtype=torch.int64), (4, 8))


class Foreign(nn.Module):
    """What another library may bring along: not our class, and A_dagger of another signature."""

    def __init__(self, m: Tensor):
        super().__init__()
        self.dense = Dense(m)
        self.A, self.A_adjoint = self.dense.A, self.dense.A_adjoint


class WithInverse(Foreign):
    def A_dagger(self, y: Tensor, **_) -> Tensor:
        return (y @ torch.linalg.pinv(self.dense.matrix).T).view(-1, 1, *SHAPE)


class WithApproximation(Foreign):
    def A_dagger(self, y: Tensor) -> Tensor:
        return 0.7 * self.A_adjoint(y)


@pytest.mark.parametrize(("kind", "tight", "way"), [
    (Foreign, False, Way.SOLVE), (Foreign, True, Way.ADJOINT), (WithInverse, False, Way.A_DAGGER),
    (WithInverse, True, Way.ADJOINT), (WithApproximation, False, Way.SOLVE)])
def test_other_libraries_operators(kind: type[Foreign], tight: bool, way: Way):
    m = matrix(5, 5)
    m = torch.linalg.qr(m.T)[0].T.contiguous() if tight else m
    operator, y = kind(m), torch.randn(2, 5, dtype=torch.float64)
    before = torch.get_rng_state()
    assert way_of(operator, y) is way
    for damping in (None, (0.0,), (0.5,), (0.0, 0.2)):
        lam = None if damping is None else torch.tensor(damping, dtype=torch.float64)
        torch.testing.assert_close(dagger(operator, y, lam).flatten(1), dense_solution(m, y, lam))
    check_operator(operator, SHAPE)
    assert torch.equal(torch.get_rng_state(), before)


class Wrong(Dense):
    """Dense, with something wrong."""

    def __init__(self, fault: str, m: Tensor):
        super().__init__(m)
        self.fault, self.tight = fault, fault == "tight"

    def A(self, x: Tensor) -> Tensor:
        y = super().A(x)
        return y[:1] if self.fault == "batch" else 0 * y if self.fault == "zero" else y

    def A_adjoint(self, y: Tensor) -> Tensor:
        x = super().A_adjoint(y)
        return {"complex": x.to(torch.complex128), "shape": x[..., 0], "adjoint": 1.01 * x}.get(self.fault, x)

    def A_dagger(self, y: Tensor, damping: Tensor | None = None) -> Tensor:
        x = super().A_dagger(y, damping)
        if self.fault == "least norm":  # something of A's null space is added
            return x + (torch.linalg.svd(self.matrix)[2][-1:] * y.sum(1, keepdim=True)).view_as(x)
        return x


@pytest.mark.parametrize(("fault", "message"), [
    ("batch", "makes 1 measurements of 2 images"), ("zero", "is of norm 0"),
    ("complex", "A_adjoint makes .* of torch.complex128"), ("shape", "A_adjoint makes .2, 1, 3."),
    ("adjoint", "A_adjoint is not the adjoint of A: .* differ by 0.00"),
    ("tight", "does not come true for Wrong .it claims to be tight.: it is off by [1-9]"),
    ("least norm", "no orthogonal projection")])
def test_operators_that_contradict_themselves(fault: str, message: str):
    check_operator(Dense(matrix(5, 5)), SHAPE)
    with pytest.raises(OperatorError, match=message):
        check_operator(Wrong(fault, matrix(5, 5)), (2, 1, *SHAPE))


def test_the_network_warns_of_them_once():
    net, operator = IDM((32, 64), 1), Wrong("adjoint", matrix(16, 16, 64).float())
    operator.image_shape, y = (8, 8), torch.rand(1, 16)
    before = torch.get_rng_state()
    with torch.no_grad():
        with pytest.warns(UserWarning, match="not the adjoint of A: .* will be wrong"):
            net(y, operator)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            net(y, operator)
    assert torch.equal(torch.get_rng_state(), before)


class NoNoise(nn.Module):
    """A U-Net that estimates 0, so that x₀ is the proximal step alone."""

    shuffle = 2

    def forward(self, x: Tensor, *_) -> Tensor:
        return torch.zeros_like(x)


def test_the_sampling_step_is_the_proximal_step():
    """x₀ − Aᵀ(A Aᵀ + λI)⁻¹(A x₀ − y), λ_t = exp(log_damping_t) σ², of an operator that is not tight and one that is."""
    torch.manual_seed(0)
    net = IDM((32, 64), 2).double()
    with torch.no_grad():
        net.log_damping.copy_(torch.tensor([1.0, 2.0]))
    sigma = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)
    x = torch.randn(3, 1, 4, 4, dtype=torch.float64)
    damping = net._damping(net._noise_level(sigma, 3))
    for m in (matrix(10, 10, 16), torch.linalg.qr(matrix(16, 10, 16))[0][:, :10].T):
        operator = Dense(m, (4, 4))
        y = torch.randn(3, 10, dtype=torch.float64)
        alpha_bar = torch.tensor([[1.0, 1.0, 1.0]], dtype=torch.float64)  # x₀ = x̂
        for step in (1, 2):
            lam = math.e**step * sigma**2
            ours = SamplingStep()(x, NoNoise(), operator, y, operator.A_dagger(y), alpha_bar, damping, step)
            expected = x.flatten(1) - dense_solution(m, x.flatten(1) @ m.T - y, lam)
            torch.testing.assert_close(ours.flatten(1), expected)


@pytest.mark.parametrize("invertible", ["both", "none"])
def test_a_noise_level_of_0_is_none(invertible: str):
    torch.manual_seed(0)
    net, operator = IDM((32, 64), 2), BlockCompressedSensing.random((8, 8), 0.3, 4, torch.Generator().manual_seed(0))
    net.invertible, y = invertible, operator.A(torch.rand(2, 1, 8, 8))
    found = []
    for level in (None, 0, torch.zeros(2), 0.05):
        net.zero_grad()
        x_hat = net(y, operator, noise_level=level)
        x_hat.square().mean().backward()
        found.append((x_hat, *(parameter.grad for parameter in net.parameters())))
    assert all(torch.equal(a, b) for other in found[1:-1] for a, b in zip(found[0], other, strict=True))
    assert net.log_damping.grad.abs().min() > 0 and (found[-1][0] - found[0][0]).abs().max() > 1e-3


@pytest.mark.parametrize(("learned", "ways"), [(False, ("both",)), (True, INVERTIBLE)])
def test_gradients_with_an_operator_that_is_not_tight(learned: bool, ways: tuple[str, ...]):
    """Every way to run in reverse against plain autograd in float64, with noise; λ and what A learns included."""
    torch.manual_seed(0)
    net = IDM((32, 64), 2, shuffle=2).double()
    net.unet.requires_grad_(False)
    net.unet.conv_in.requires_grad_()
    m = torch.diag(torch.tensor([1.0, 2.0], dtype=torch.float64).repeat(15)) @ torch.linalg.qr(
        torch.randn(64, 30, dtype=torch.float64))[0].T
    operator = Dense(nn.Parameter(m) if learned else m, (8, 8))
    y = (torch.randn(2, 64, dtype=torch.float64) @ m.T).requires_grad_()
    sigma = torch.tensor([0.0, 0.1], dtype=torch.float64)
    inputs = [y, *operator.parameters(), *(p for p in net.parameters() if p.requires_grad)]
    found = {}
    for net.invertible in {"none", *ways}:
        found[net.invertible] = torch.autograd.grad(net(y, operator, sigma).abs().mean(), inputs)
    assert all(gradient.norm() > 0 for gradient in found["none"])
    for ours in found.values():
        for a, b in zip(ours, found["none"], strict=True):
            assert (a - b).norm() <= 1e-8 * b.norm() + 1e-14


@pytest.mark.parametrize("level", [-0.1, float("nan"), torch.zeros(3), torch.tensor([0.1, -0.1])])
def test_impossible_noise_levels(level):
    with pytest.raises(ValueError, match="noise_level must be at least 0, one number or one of each of the 2 images"):
        IDM((32, 64), 1)(torch.zeros(2, 5), Dense(torch.eye(64)[:5], (8, 8)), level)


def test_the_start_with_noise_of_an_operator_that_is_not_tight():
    """A⁺ would enlarge noise; what the chain starts from is Aᵀ(A Aᵀ + σ²I)⁻¹y, and A⁺y of an operator that is tight."""
    torch.manual_seed(0)
    net, x = IDM((32, 64), 1).double().eval(), []
    net.unet.register_forward_pre_hook(lambda module, args: x.append(args[1]))
    sigma, y = torch.tensor([0.0, 0.3], dtype=torch.float64), torch.randn(2, 10, dtype=torch.float64)
    orthonormal = torch.linalg.qr(matrix(64, 10, 64))[0][:, :10].T
    for m, lam in ((matrix(10, 10, 64), sigma**2), (orthonormal, 0 * sigma)):
        operator = Dense(m, (8, 8))
        operator.tight = bool(lam.sum() == 0)
        with torch.no_grad():
            net(y, operator, sigma)
        torch.testing.assert_close(x.pop().flatten(1), dense_solution(m, y, lam))


# --- images of two channels -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["mri", "multicoil_mri", "inpainting"])
def test_complex_images_through_the_whole_network(name: str):
    """Gradients of every way to run in reverse against plain autograd in float64."""
    torch.manual_seed(0)
    settings = {} if name == "inpainting" else {"complex_images": True, "acceleration": 2.0}
    operator = OPERATORS[name].random((8, 8), torch.Generator().manual_seed(0), **settings).double()
    net = IDM((32, 64), 1, in_channels=2).double()
    assert IDM.from_config(net.config).config.in_channels == 2
    y, inputs, found = operator.A(torch.randn(2, 2, 8, 8, dtype=torch.float64)), list(net.parameters()), {}
    for net.invertible in {"none", "both"}:
        x_hat = net(y, operator, 0.1)
        assert x_hat.shape == (2, 2, 8, 8)
        found[net.invertible] = torch.autograd.grad(x_hat.abs().mean(), inputs)
    assert all((a - b).norm() <= 1e-8 * b.norm() + 1e-14 for a, b in zip(*found.values(), strict=True))
    with torch.no_grad():
        net.steps[0].v.zero_()  # the result is x₀, which agrees with y
        assert (operator.A(net(y, operator)) - y).norm() <= 1e-2 * y.norm()


def test_a_network_for_another_number_of_channels_says_so():
    operator = OPERATORS["mri"].random((8, 8), torch.Generator().manual_seed(0), complex_images=True)
    with pytest.raises(ValueError, match="images of 2 channels, but the network is for 1: see .* in_channels"):
        IDM((32, 64), 1)(torch.zeros(1, 2, 8, 8), operator)
    net = IDM((32, 64), 1, in_channels=2)
    assert not net.fits_official_format
    with pytest.raises(ValueError, match="in_channels 1, not 2; use save_pretrained"):
        net.official_state_dict()
    with pytest.raises(ValueError, match="in_channels must be at least 1, not 0"):
        IDM((32, 64), 1, in_channels=0)
    compact, y = IDM.compact(32, 1, in_channels=2), torch.randn(1, 2, 16, 16)
    operator = OPERATORS["inpainting"].random((16, 16), torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(compact(operator.A(y), operator), operator.A(y), rtol=0.05, atol=0.05)
