"""DDNM, zero-shot reconstruction by a denoising diffusion null-space model (Wang, Yu, Zhang, ICLR 2023).

An unconditional DDPM draws an image whose part in the range of A is replaced, at every step, by what was measured:

    x0  = (x_i − √(1 − ᾱ_i) ε) / √ᾱ_i          ε: the network's estimate of the noise in x_i
    x0' = x0 − λ A⁺(A x0 − y)                  λ = 1, or less where y is noisy (DDNM+)
    x_j = √ᾱ_j x0' + √(1 − ᾱ_j) (η z + √(1 − η²) ε),  z ~ N(0, I)
"""
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from utils.errors import UserError

Estimator = Callable[[Tensor, int], Tensor]  # (x_i (batch, C, H, W), i) -> ε of the same shape
TOLERANCE = 1e-3  # relative, of the test whether all singular values are one


@dataclass(frozen=True)
class Sampling:
    """The settings of DDNM, the published ones by default; raises ValueError for impossible ones.

    Attributes:
        steps: evaluations of the network without time travel; of 1000 steps of training, 100 take every tenth.
        eta: η in [0, 1], the share of the noise that is drawn anew at each step; 0 makes the chain deterministic.
        travel_length: steps that a time travel goes back (RePaint's jump length).
        travel_repeat: times that each stretch of that length is walked; 1: no time travel.
        noise_level: standard deviation of the noise in y, where the image is in [0, 1], one for all or (batch,);
            above 0: DDNM+.
    """

    steps: int = 100
    eta: float = 0.85
    travel_length: int = 1
    travel_repeat: int = 1
    noise_level: float | Tensor = 0.0

    def __post_init__(self):
        for name in ("steps", "travel_length", "travel_repeat"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta must lie in [0, 1], not {self.eta}")
        levels = torch.as_tensor(self.noise_level)
        if not (levels.isfinite() & (levels >= 0)).all():
            raise ValueError(f"noise_level must be finite and not negative, not {self.noise_level}")

    def times(self, training_steps: int) -> list[int]:
        """Return the indices of ᾱ that the chain visits, from the noisiest to 0; a rise is a time travel.

        The times lie `training_steps` / `steps` apart and end with 1, 0 (published: 991, 981, ..., 1, 0).
        """
        if self.steps > training_steps:
            raise ValueError(f"steps must be at most {training_steps}, those of training, not {self.steps}")
        returns = dict.fromkeys(range(0, self.steps - self.travel_length, self.travel_length), self.travel_repeat - 1)
        position, visited = self.steps - 1, []
        while position >= 0:
            visited.append(position * training_steps // self.steps + 1)
            if returns.get(position):
                returns[position] -= 1
                position += self.travel_length
            else:
                position -= 1
        return [*visited, 0]


@torch.no_grad()
def ddnm(
    y: Tensor,  # measurements of images in [0, 1]
    operator,  # A, A_adjoint and A_dagger; ours or deepinv's
    estimate_noise: Estimator,
    alpha_bar: Tensor,  # (T + 1,): ᾱ_0 = 1, ᾱ_1, ..., ᾱ_T of the DDPM
    sampling: Sampling,
    draw: Callable[[], Tensor],  # standard normal numbers (batch, C, H, W), the same call after call in each run
) -> Tensor:
    """Return images (batch, C, H, W), about in [0, 1], not clamped, with A x̂ = y where y is without noise.

    Raises UserError where y is noisy and the operator has more than one singular value.
    """
    x = x0 = draw()
    eta = sampling.eta
    noise_in_range = _noise_in_range(operator, x, sampling.noise_level)
    for i, j in pairwise(sampling.times(len(alpha_bar) - 1)):
        a, sigma = alpha_bar[j].sqrt(), (1 - alpha_bar[j]).sqrt()
        if j > i:  # time travel: noise is added to the last estimate
            x = a * x0 + sigma * draw()
            continue
        epsilon = estimate_noise(x, i)
        x0 = (x - (1 - alpha_bar[i]).sqrt() * epsilon) / alpha_bar[i].sqrt()
        # The chain's images are in [-1, 1]: A measures (x0 + 1) / 2.
        correction = 2 * operator.A_dagger(operator.A((x0 + 1) / 2) - y)
        z = draw()
        noise = sigma * (eta * z + (1 - eta**2) ** 0.5 * epsilon)
        if noise_in_range is not None:
            # What y brings along may not exceed the noise that x_j is to hold; z adds what is missing in A's range.
            brought = a * noise_in_range
            scale = torch.where(sigma < brought, sigma * (1 - eta**2) ** 0.5 / brought, 1)  # λ
            correction = scale * correction
            added = (sigma**2 - (scale * brought) ** 2).clamp(min=0).sqrt()
            noise = noise + operator.A_dagger(operator.A(added * z - noise))
        x = a * (x0 - correction) + noise
    return (x + 1) / 2


def _noise_in_range(operator, x: Tensor, noise_level: float | Tensor) -> Tensor | None:
    """Return the standard deviation of the noise in A⁺y, for images in [-1, 1], (batch or 1, 1, 1, 1); None without.

    It is 2 σ / s, s the singular value of A. Raises UserError where singular values differ, for then there is no one.
    """
    levels = torch.as_tensor(noise_level, dtype=x.dtype, device=x.device).view(-1, 1, 1, 1)
    if not levels.any():
        return None
    v = operator.A_adjoint(operator.A(x))
    w = operator.A_adjoint(operator.A(v))
    squared = (w * v).sum() / (v * v).sum()  # v is in the range of Aᵀ, where AᵀA is s²
    if (w - squared * v).norm() > TOLERANCE * w.norm():
        raise UserError("DDNM cannot allow for noise with this operator: it needs a tight one, all of whose singular "
                        "values are alike; measure without noise")
    return 2 * levels / squared.sqrt()
