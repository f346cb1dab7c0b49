"""Noise schedules: ᾱ_0 = 1, ᾱ_1, …, ᾱ_T, the share of signal that is left at each step (paper, section 3.1)."""
import torch
from torch import Tensor, nn


class LearnedSchedule(nn.Module):
    """ᾱ_t = α_1 ⋯ α_t with the α's learned, as published; nothing keeps a learned α below 1, or the ᾱ's in order.

    Args:
        num_steps: T.
        alpha: initial value of every α.
    """

    def __init__(self, num_steps: int, alpha: float = 0.5):
        super().__init__()
        self.alpha = nn.Parameter(torch.full((num_steps,), alpha))

    def forward(self) -> Tensor:
        """(T + 1,): ᾱ_0 = 1, ᾱ_1, …, ᾱ_T, these held below 1 − 1e-4."""
        alpha = self.alpha.to(torch.promote_types(self.alpha.dtype, torch.float32))  # products of half precision add up
        # Training may bring an α past 1, where √(1 − ᾱ) is nan; close below, its derivative has no bound.  The gradient
        # passes, or an α that was held back once would never move again.
        alpha_bar = alpha.cumprod(0)
        alpha_bar = alpha_bar + (alpha_bar.clamp(max=1 - 1e-4) - alpha_bar).detach()
        return torch.cat((alpha.new_ones(1), alpha_bar))


SCHEDULES = {"learned": LearnedSchedule}
