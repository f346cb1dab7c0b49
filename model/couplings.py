"""What a coupling computes: two streams in, two streams out, and the way back (paper, equation of the "wiring").

A coupling is a module with two methods, which are all that `ReversibleChain` needs of it:

    forward(x1, x2, *context) -> (y1, y2)
    inverse(y1, y2, *context) -> (x1, x2)

Another one is such a class and a line in `COUPLINGS`.  It may add, as `WeightedCoupling` does, `rebuild`, where streams
can be rebuilt and differentiated at the cost of computing its bodies once instead of twice, and `amplification`, by how
much its inverse enlarges errors.
"""
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

Streams = tuple[Tensor, Tensor]


class WeightedCoupling(nn.Module):
    """The published coupling, with a learned scalar v:

        y₁ = (1 − v) f(x₁, *context) + v x₂        x₁ = y₂
        y₂ = x₁                                    x₂ = (y₁ − (1 − v) f(y₂, *context)) / v

    Args:
        body: f, a module that returns a tensor of its first argument's shape.
        v: initial value; the coupling is invertible for every v but 0.
    """

    bodies: ClassVar[int] = 1  # how many modules a coupling is made of

    def __init__(self, body: nn.Module, v: float = 0.5):
        super().__init__()
        self.body = body
        self.v = nn.Parameter(torch.full((1,), float(v)))

    def forward(self, x1: Tensor, x2: Tensor, *context: Any) -> Streams:
        return self.mix(self._f(x1, context), x2), x1

    def inverse(self, y1: Tensor, y2: Tensor, *context: Any) -> Streams:
        return y2, self.unmix(self._f(y2, context), y1)

    def rebuild(self, y1: Tensor, y2: Tensor, *context: Any) -> tuple[Streams, Streams]:
        """Return (x1, x2), leaves of a graph, and (y1, y2) computed from them; f is computed once."""
        x1 = y2.detach().requires_grad_()
        fx = self._f(x1, context)
        x2 = self.unmix(fx, y1).detach().requires_grad_()
        return (x1, x2), (self.mix(fx, x2), x1)

    def _f(self, x1: Tensor, context: tuple) -> Tensor:
        return self.body(x1, *context).to(x1.dtype)  # the streams keep their precision, whatever f computes in

    @property
    def amplification(self) -> Tensor:
        """By how much the inverse enlarges an error of y₁: 1 / |v|."""
        return 1 / self.v.detach().abs()

    def mix(self, fx: Tensor, x2: Tensor) -> Tensor:
        """Return y₁ of f(x₁) and x₂."""
        return torch.lerp(fx, x2, self.v.to(fx.dtype))  # one pass over memory where the formula has three

    def unmix(self, fx: Tensor, y1: Tensor) -> Tensor:
        """Return x₂ of f(x₁) and y₁."""
        return (y1 - (1 - self.v) * fx) / self.v


class AdditiveCoupling(nn.Module):
    """The coupling of "Reverse Anything" (and of RevNets), whose inverse amplifies nothing:

        y₁ = x₁ + F(x₂, *context)        x₂ = y₂ − G(y₁, *context)
        y₂ = x₂ + G(y₁, *context)        x₁ = y₁ − F(x₂, *context)

    Without G it is that paper's "reversible noise injection", y₂ = x₂.

    Args:
        f, g: modules that return a tensor of their first argument's shape.

    The context is handed to both bodies.  Where they read different things, the context is one tuple for each of them:
    coupling(x1, x2, (skip,), (back_projection, operator, step)), with () for a body that reads nothing.
    """

    bodies: ClassVar[int] = 2

    def __init__(self, f: nn.Module, g: nn.Module | None = None):
        super().__init__()
        self.f, self.g = f, g

    def forward(self, x1: Tensor, x2: Tensor, *context: Any) -> Streams:
        of_f, of_g = self._contexts(context)
        y1 = x1 + self.f(x2, *of_f).to(x1.dtype)
        return y1, x2 if self.g is None else x2 + self.g(y1, *of_g).to(x2.dtype)

    def inverse(self, y1: Tensor, y2: Tensor, *context: Any) -> Streams:
        of_f, of_g = self._contexts(context)
        x2 = y2 if self.g is None else y2 - self.g(y1, *of_g).to(y2.dtype)
        return y1 - self.f(x2, *of_f).to(y1.dtype), x2

    def _contexts(self, context: tuple) -> tuple[tuple, tuple]:
        """Return what F reads beside its stream, and what G reads."""
        if not context or not all(isinstance(item, tuple) for item in context):
            return context, context
        wanted = 1 if self.g is None else 2
        if len(context) != wanted:
            raise ValueError(f"the context of an additive coupling is one for all its bodies, or one tuple for each of "
                             f"the {wanted}, not {len(context)} tuples")
        return context[0], context[-1]


class Swapped(nn.Module):
    """A coupling whose two streams change places before: in a chain of halves each stream is read in turn.

    Of the additive coupling without G it makes y₁ = x₂ + F(x₁), y₂ = x₁, streams as those of the weighted coupling.
    """

    def __init__(self, coupling: nn.Module):
        super().__init__()
        self.coupling = coupling

    def forward(self, x1: Tensor, x2: Tensor, *context: Any) -> Streams:
        return self.coupling(x2, x1, *context)

    def inverse(self, y1: Tensor, y2: Tensor, *context: Any) -> Streams:
        x2, x1 = self.coupling.inverse(y1, y2, *context)
        return x1, x2


COUPLINGS = {"weighted": WeightedCoupling, "additive": AdditiveCoupling}
