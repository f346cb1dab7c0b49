"""DDNM against closed forms: of a Gaussian prior the exact noise estimate is affine, hence so is the whole chain."""
import itertools
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from baselines.ddnm import Sampling, ddnm
from model import BlockCompressedSensing
from utils.errors import UserError

SIDE = 4
PIXELS = SIDE * SIDE
ALPHA_BAR = np.concatenate([[1], np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))])


@dataclass
class Scaled:
    """A tight operator times a number, whose A Aᵀ = factor² I."""

    tight: BlockCompressedSensing
    factor: float

    def A(self, x: Tensor) -> Tensor:
        return self.factor * self.tight.A(x)

    def A_adjoint(self, y: Tensor) -> Tensor:
        return self.factor * self.tight.A_adjoint(y)

    def A_dagger(self, y: Tensor) -> Tensor:
        return self.tight.A_adjoint(y) / self.factor


def operator(factor: float = 1.0) -> Scaled:
    random = np.random.default_rng(0)
    phi = torch.from_numpy(np.linalg.qr(random.standard_normal((4, 4)))[0][:, :2].copy())
    return Scaled(BlockCompressedSensing(phi, torch.from_numpy(random.permutation(PIXELS)), (SIDE, SIDE)), factor)


def dense(op) -> np.ndarray:
    """A as a matrix (m, n)."""
    basis = torch.eye(PIXELS, dtype=torch.float64).view(PIXELS, 1, SIDE, SIDE)
    return op.A(basis).flatten(1).numpy().T


@dataclass
class Gaussian:
    """A prior N(mean, covariance) of images in [-1, 1], flattened."""

    mean: np.ndarray  # (n,)
    covariance: np.ndarray  # (n, n)

    def noise_matrix(self, i: int) -> np.ndarray:
        """K of the exact estimate E[ε | x_i] = K (x_i − √ᾱ_i mean)."""
        a = ALPHA_BAR[i]
        return np.sqrt(1 - a) * np.linalg.inv(a * self.covariance + (1 - a) * np.eye(PIXELS))

    def estimate_noise(self, x: Tensor, i: int) -> Tensor:
        centred = x.flatten(1) - np.sqrt(ALPHA_BAR[i]) * torch.from_numpy(self.mean)
        return (centred @ torch.from_numpy(self.noise_matrix(i)).T).view_as(x)


def correlated() -> Gaussian:
    random = np.random.default_rng(1)
    root = random.standard_normal((PIXELS, PIXELS))
    return Gaussian(random.standard_normal(PIXELS), root @ root.T / PIXELS + 0.05 * np.eye(PIXELS))


WHITE = Gaussian(np.zeros(PIXELS), np.eye(PIXELS))


def moments_of_the_code(prior: Gaussian, op, y: np.ndarray, sampling: Sampling):
    """Mean and covariance of the code's samples, by giving it every unit vector in the place of what it draws."""
    draws = len(sampling.times(1000)) if sampling.eta else 1  # with η = 0 only x_T counts
    runs = 1 + draws * PIXELS  # the first with zeros
    numbers = itertools.count()

    def draw() -> Tensor:
        number = next(numbers)
        z = torch.zeros(runs, PIXELS, dtype=torch.float64)
        if number < draws:
            z[1 + number * PIXELS:][:PIXELS] = torch.eye(PIXELS, dtype=torch.float64)
        return z.view(runs, 1, SIDE, SIDE)

    measured = torch.from_numpy(y).view_as(op.A(torch.zeros(1, 1, SIDE, SIDE, dtype=torch.float64)))
    x_hat = ddnm(measured.repeat(runs, 1, 1), op, prior.estimate_noise, torch.from_numpy(ALPHA_BAR), sampling, draw)
    assert next(numbers) == draws or not sampling.eta  # or a draw was left out of the covariance
    samples = 2 * x_hat.flatten(1).numpy() - 1
    effects = samples[1:] - samples[0]
    return samples[0], effects.T @ effects


def moments_by_recursion(prior: Gaussian, a_matrix: np.ndarray, y: np.ndarray, sampling: Sampling):
    """The same by the published formulas, in the basis of A's singular vectors, from y of images in [-1, 1]."""
    u, singular, vt = np.linalg.svd(a_matrix)
    s = np.zeros(PIXELS)
    s[:len(singular)] = singular
    eta, sigma_y, seen = sampling.eta, 2 * sampling.noise_level, s > 0
    least_squares = vt.T[:, :len(singular)] @ ((u.T @ y) / singular)
    mean, covariance = np.zeros(PIXELS), np.eye(PIXELS)
    mean0, covariance0 = mean, covariance  # of x0
    for i, j in itertools.pairwise(sampling.times(1000)):
        a, sigma = np.sqrt(ALPHA_BAR[j]), np.sqrt(1 - ALPHA_BAR[j])
        if j > i:
            mean, covariance = a * mean0, a**2 * covariance0 + sigma**2 * np.eye(PIXELS)
            continue
        k = prior.noise_matrix(i)
        shift = -np.sqrt(ALPHA_BAR[i]) * k @ prior.mean  # ε = k x + shift
        root = np.sqrt(1 - ALPHA_BAR[i])
        to_x0, at_x0 = (np.eye(PIXELS) - root * k) / np.sqrt(ALPHA_BAR[i]), -root * shift / np.sqrt(ALPHA_BAR[i])
        scale, fresh, old = np.ones(PIXELS), np.full(PIXELS, sigma * eta), np.full(PIXELS, sigma * np.sqrt(1 - eta**2))
        if sigma_y:
            bound = np.divide(a * sigma_y, s, out=np.zeros(PIXELS), where=seen)
            low = seen & (sigma < bound)
            scale[low] = s[low] * sigma * np.sqrt(1 - eta**2) / (a * sigma_y)
            high = seen & ~low
            fresh[high] = np.sqrt(sigma**2 - bound[high]**2)
            old[seen] = 0
        correction = vt.T @ np.diag(scale * seen) @ vt
        epsilon = vt.T @ np.diag(old) @ vt
        step = a * (np.eye(PIXELS) - correction) @ to_x0 + epsilon @ k
        offset = a * ((np.eye(PIXELS) - correction) @ at_x0 + correction @ least_squares) + epsilon @ shift
        mean0, covariance0 = to_x0 @ mean + at_x0, to_x0 @ covariance @ to_x0.T
        mean, covariance = step @ mean + offset, step @ covariance @ step.T + vt.T @ np.diag(fresh**2) @ vt
    return mean, covariance


SETTINGS = [
    Sampling(steps=10),
    Sampling(steps=10, eta=0.3),
    Sampling(steps=7, travel_length=2, travel_repeat=3),
    Sampling(steps=10, noise_level=0.1),
    Sampling(steps=10, eta=0.5, noise_level=0.3, travel_length=3, travel_repeat=2),
]


@pytest.mark.parametrize("factor", [1.0, 3.0])
@pytest.mark.parametrize("sampling", SETTINGS, ids=str)
def test_samples_have_the_mean_and_covariance_of_the_exact_recursion(sampling, factor):
    op, prior = operator(factor), correlated()
    x01 = np.random.default_rng(2).random(PIXELS)
    y01 = dense(op) @ x01
    mean, covariance = moments_of_the_code(prior, op, y01, sampling)
    expected, expected_covariance = moments_by_recursion(prior, dense(op), 2 * y01 - dense(op) @ np.ones(PIXELS),
                                                         sampling)
    np.testing.assert_allclose(mean, expected, atol=1e-9)
    np.testing.assert_allclose(covariance, expected_covariance, atol=1e-9)
    assert np.abs(covariance).max() > 1e-3


def test_of_a_white_prior_the_samples_are_the_posterior_but_for_discretisation():
    """y in the range of A, N(0, I) in the null space; with η = 0 the variance lacks 3.6 % at 100 steps, 0.4 at 1000."""
    op = operator()
    y01 = dense(op) @ np.random.default_rng(3).random(PIXELS)
    null = np.eye(PIXELS) - np.linalg.pinv(dense(op)) @ dense(op)
    for steps, error in ((100, 0.037), (1000, 0.004)):
        mean, covariance = moments_of_the_code(WHITE, op, y01, Sampling(steps, eta=0.0))
        np.testing.assert_allclose(mean, np.linalg.pinv(dense(op)) @ (2 * y01 - dense(op) @ np.ones(PIXELS)),
                                   atol=1e-9)
        np.testing.assert_allclose(covariance, null, atol=error)
        assert np.abs(covariance - null).max() > error / 10  # not a bound that everything passes


def test_a_chain_that_draws_anew_has_too_little_variance_in_the_null_space():
    """η is a share of √(1 − ᾱ_j) here, not of DDPM's posterior: many steps tend to (1 + √(1 − η²)) / 2 instead of 1."""
    prior_variance = np.trace(moments_by_recursion(WHITE, dense(operator()), np.zeros(8), Sampling(1000))[1]) / 8
    assert prior_variance == pytest.approx((1 + np.sqrt(1 - 0.85**2)) / 2, abs=0.01)


def test_published_times_are_every_tenth_step_and_time_travel_is_repaints():
    assert Sampling().times(1000) == [*range(991, 0, -10), 0]
    assert Sampling(6, travel_length=2, travel_repeat=2).times(6) == [6, 5, 4, 3, 5, 4, 3, 2, 1, 3, 2, 1, 0]


@pytest.mark.parametrize(("settings", "message"), [
    ({"steps": 0}, "steps must be at least 1"), ({"eta": 1.2}, "eta must lie"), ({"eta": float("nan")}, "eta must lie"),
    ({"travel_repeat": 0}, "travel_repeat must be"), ({"noise_level": -1.0}, "noise_level must be"),
])
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**settings)


def test_noise_needs_a_tight_operator():
    @dataclass
    class Uneven(Scaled):
        def A(self, x: Tensor) -> Tensor:
            return super().A(x) * torch.tensor([1.0, 2.0])

        def A_adjoint(self, y: Tensor) -> Tensor:
            return super().A_adjoint(y * torch.tensor([1.0, 2.0]))

    op = Uneven(operator().tight, 1.0)
    x = torch.rand(1, 1, SIDE, SIDE, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with pytest.raises(UserError, match="tight"):
        ddnm(op.A(x), op, WHITE.estimate_noise, torch.from_numpy(ALPHA_BAR), Sampling(5, noise_level=0.1), lambda: x)
