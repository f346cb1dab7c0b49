"""What every measurement operator is: A takes an image to what the camera records, A_adjoint takes it back.

Methods are named as deepinv names them (A, A_adjoint, A_dagger).  deepinv's linear physics with A Aᵀ = I serve here;
ours serve there as `LinearPhysics(A=operator.A, A_adjoint=operator.A_adjoint)`.
"""
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


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

    def measured(self, y: Tensor) -> float:
        """Return how many numbers y holds of an image, not counting those that are 0 by construction."""
        return y[0].numel()

    def forward(self, x: Tensor) -> Tensor:
        return self.A(x)


class TransformedOperator(LinearOperator):
    """A T, for an operator A and a transform T of images with T Tᵀ = I; a subclass gives T and Tᵀ."""

    def __init__(self, operator: nn.Module):
        super().__init__()
        self.operator = operator
        self.same_for_all = getattr(operator, "same_for_all", False)

    def transform(self, x: Tensor) -> Tensor:
        """Return T x."""
        raise NotImplementedError

    def transform_adjoint(self, x: Tensor) -> Tensor:
        """Return Tᵀ x."""
        raise NotImplementedError

    def A(self, x: Tensor) -> Tensor:
        return self.operator.A(self.transform(x))

    def A_adjoint(self, y: Tensor) -> Tensor:
        return self.transform_adjoint(self.operator.A_adjoint(y))

    def A_dagger(self, y: Tensor) -> Tensor:
        return self.transform_adjoint(self.operator.A_dagger(y))


class PaddedOperator(TransformedOperator):
    """Measures the first H rows and W columns of a larger image, of which nothing else is measured.

    Args:
        operator: of images of (H, W) = image_shape.
        multiple: the sides of the larger image are the next multiples of it.
    """

    def __init__(self, operator: nn.Module, image_shape: tuple[int, int], multiple: int):
        super().__init__(operator)
        self.image_shape, self.multiple = tuple(image_shape), multiple

    def transform(self, x: Tensor) -> Tensor:
        height, width = self.image_shape
        return x[..., :height, :width]

    def transform_adjoint(self, x: Tensor) -> Tensor:
        """Return x with zeros below and to the right."""
        height, width = self.image_shape
        return F.pad(x, (0, -width % self.multiple, 0, -height % self.multiple))


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

    def measured(self, y: Tensor) -> float:
        each = zip(self.operators, y.split(1), strict=True)
        return sum(operator.measured(part) for operator, part in each) / len(y)

    def _each(self, method: str, batch: Tensor) -> Tensor:
        if len(batch) != len(self.operators):
            raise ValueError(f"there are operators for {len(self.operators)} images, not for {len(batch)}")
        images = zip(self.operators, batch.split(1), strict=True)
        return torch.cat([getattr(operator, method)(image) for operator, image in images])
