"""Noise schedules by name: ᾱ_0 = 1, ᾱ_1, …, ᾱ_T, the share of signal that is left at each step (paper, section 3.1).

A schedule is a module `Schedule(num_steps, **settings)`; its forward takes the back-projection (batch, channels, H, W)
and returns ᾱ, (batch, T + 1) where it depends on the image and (1, T + 1) where it does not.  It stays in fp32
where the network is cast to half precision, being a `FullPrecisionModule`.
"""
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .precision import FullPrecisionModule


class LearnedSchedule(FullPrecisionModule):
    """ᾱ_t = α_1 ⋯ α_t with the α's learned, as published; nothing keeps a learned α below 1, or the ᾱ's in order.

    Args:
        num_steps: T.
        alpha: initial value of every α.
    """

    def __init__(self, num_steps: int, alpha: float = 0.5):
        super().__init__()
        self.alpha = nn.Parameter(torch.full((num_steps,), alpha))

    def forward(self, back_projection: Tensor | None = None) -> Tensor:
        """(1, T + 1), whatever the image: ᾱ_0 = 1, ᾱ_1, …, ᾱ_T, these held below 1 − 1e-4."""
        alpha = self.alpha.to(torch.promote_types(self.alpha.dtype, torch.float32))  # products of half precision add up
        # Training may bring an α past 1, where √(1 − ᾱ) is nan; close below, its derivative has no bound.
        alpha_bar = _clamped(alpha.cumprod(0), most=1 - 1e-4)
        return torch.cat((alpha.new_ones(1), alpha_bar))[None]


class DynamicSchedule(FullPrecisionModule):
    """ᾱ_t = α_1 ⋯ α_t with α_t = 1 − β_t, β_t = (1 − cos(π t / (2T))) / s + γ Φ(A⁺y), of "Reverse Anything".

    γ is learned, initially 0; Φ is a small network that maps the back-projection A⁺y to one number.

    Args:
        num_steps: T.
        scale: s, above 1; β_T is 1 / s in the beginning.
        width: channels of Φ.

    Raises:
        ValueError: for a scale that is not above 1, or a width below 1.
    """

    def __init__(self, num_steps: int, scale: float = 20.0, width: int = 8):
        super().__init__()
        if not scale > 1:
            raise ValueError(f"the schedule's scale must be above 1, not {scale}")
        if width < 1:
            raise ValueError(f"the schedule's width must be at least 1, not {width}")
        self.num_steps, self.scale = num_steps, scale
        self.gamma = nn.Parameter(torch.zeros(1))
        self.phi = nn.Sequential(
            nn.Conv2d(1, width, kernel_size=3, stride=2, padding=1), nn.SiLU(),
            nn.Conv2d(width, 2 * width, kernel_size=3, stride=2, padding=1), nn.SiLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, 1))

    def forward(self, back_projection: Tensor) -> Tensor:
        """(batch, T + 1): ᾱ_0 = 1 and ᾱ_1 ≥ … ≥ ᾱ_T of each image, these held between 1e-4 and 1 − 1e-6."""
        dtype = torch.promote_types(self.gamma.dtype, torch.float32)
        with torch.autocast(back_projection.device.type, enabled=False):
            # The mean over channels, so that Φ serves images of any number of them.
            phi = self.phi(back_projection.mean(dim=1, keepdim=True).to(self.gamma.dtype))  # (batch, 1)
        t = torch.arange(1, self.num_steps + 1, dtype=dtype, device=phi.device)
        beta = (1 - torch.cos(math.pi * t / (2 * self.num_steps))) / self.scale + self.gamma * phi
        alpha = _clamped(1 - beta, least=1e-3, most=1 - 1e-6)
        return F.pad(_clamped(alpha.cumprod(1), least=1e-4), (1, 0), value=1.0)


def _clamped(x: Tensor, least: float | None = None, most: float | None = None) -> Tensor:
    """x between the bounds; the gradient passes, or what was clamped once would never move again."""
    return x.detach().clamp(least, most) + (x - x.detach())


SCHEDULES = {"learned": LearnedSchedule, "dynamic": DynamicSchedule}
