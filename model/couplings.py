"""What a coupling computes: two streams in, two streams out, and the inverse (paper, equation of the "wiring").

    y₁ = (1 − v) f(x₁, *context) + v x₂        x₁ = y₂
    y₂ = x₁                                    x₂ = (y₁ − (1 − v) f(y₂, *context)) / v
"""
from typing import Any

import torch
from torch import Tensor, nn


class Coupling(nn.Module):
    """y₁ = (1 − v) f(x₁, *context) + v x₂, y₂ = x₁, with a learned scalar v.

    Another coupling is a subclass with a `mix` and an `unmix` of its own: the chain needs no more to invert and to
    differentiate it.

    Args:
        body: f, a module that returns a tensor of its first argument's shape.
        v: initial value; the coupling is invertible for every v but 0.
    """

    def __init__(self, body: nn.Module, v: float = 0.5):
        super().__init__()
        self.body = body
        self.v = nn.Parameter(torch.full((1,), float(v)))

    def mix(self, fx: Tensor, x2: Tensor) -> Tensor:
        """y₁ of f(x₁) and x₂."""
        return (1 - self.v) * fx + self.v * x2

    def unmix(self, fx: Tensor, y1: Tensor) -> Tensor:
        """x₂ of f(x₁) and y₁."""
        return (y1 - (1 - self.v) * fx) / self.v

    def forward(self, x1: Tensor, x2: Tensor, *context: Any) -> tuple[Tensor, Tensor]:
        fx = self.body(x1, *context).to(x2.dtype)  # the streams keep their precision, whatever f computes in
        return self.mix(fx, x2), x1

    def inverse(self, y1: Tensor, y2: Tensor, *context: Any) -> tuple[Tensor, Tensor]:
        fx = self.body(y2, *context).to(y1.dtype)
        return y2, self.unmix(fx, y1)


COUPLINGS = {"weighted": Coupling}
