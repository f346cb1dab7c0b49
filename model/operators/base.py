"""What every measurement operator is: A takes an image to what the camera records, A_adjoint takes it back.

Methods are named as deepinv names them (A, A_adjoint, A_dagger).  deepinv's linear physics with A Aᵀ = I serve here;
ours serve there as `LinearPhysics(A=operator.A, A_adjoint=operator.A_adjoint)`.
"""
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


class LinearOperator(nn.Module):
    """Base of all operators with A Aᵀ = I; a subclass gives `A` and `A_adjoint`.

    Being a module it moves with `.to(device)`, and the reversible engine finds its parameters, should it have any.

    Attributes:
        same_for_all: whether every image of a batch is measured alike, so that a batch may be taken apart, which saves
            memory in training; set it where that is so.
    """

    same_for_all = False

    @classmethod
    def shared(cls, generator: torch.Generator) -> dict[str, Any]:
        """Return what is drawn once for a whole run and then given to every `random` by name; here nothing.

        A subclass adds to the signature those of its settings that it reads.
        """
        return {}

    @classmethod
    def side_multiple(cls) -> int:
        """Return what H and W of every image must be a multiple of; settings as in `shared`."""
        return 1

    @classmethod
    def stacked(cls, operators: "Sequence[LinearOperator]") -> "LinearOperator":
        """Return the operator that measures image i of a batch by operators[i]; all are drawn with equal settings."""
        return PerImageOperator(operators)

    def A(self, x: Tensor) -> Tensor:
        """Measure images x (batch, 1, H, W)."""
        raise NotImplementedError(f"{type(self).__name__} must define A")

    def A_adjoint(self, y: Tensor) -> Tensor:
        """Aᵀy: images (batch, 1, H, W) from measurements."""
        raise NotImplementedError(f"{type(self).__name__} must define A_adjoint")

    def A_dagger(self, y: Tensor) -> Tensor:
        """A⁺y, the least-squares image of least norm; equal to Aᵀy since A Aᵀ = I."""
        return self.A_adjoint(y)

    def forward(self, x: Tensor) -> Tensor:
        return self.A(x)


class PerImageOperator(LinearOperator):
    """Measures each image of a batch by its own operator; all give measurements of one shape."""

    def __init__(self, operators: Sequence[nn.Module]):
        super().__init__()
        self.operators = nn.ModuleList(operators)

    def A(self, x: Tensor) -> Tensor:
        return self._each("A", x)

    def A_adjoint(self, y: Tensor) -> Tensor:
        return self._each("A_adjoint", y)

    def A_dagger(self, y: Tensor) -> Tensor:
        return self._each("A_dagger", y)

    def _each(self, method: str, batch: Tensor) -> Tensor:
        if len(batch) != len(self.operators):
            raise ValueError(f"there are operators for {len(self.operators)} images, not for {len(batch)}")
        images = zip(self.operators, batch.split(1), strict=True)
        return torch.cat([getattr(operator, method)(image) for operator, image in images])
