"""What every measurement operator is: A takes an image to what the camera records, A_adjoint takes it back.

Methods are named as deepinv names them (A, A_adjoint, A_dagger); deepinv's linear physics serve here as they are.
"""
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .least_squares import System, damped_inverse, per_image
from .pseudo_inverse import dagger


class LinearOperator(nn.Module):
    """Base of all operators; a subclass gives `A` and `A_adjoint`, and where there is a closed form `A_dagger`.

    Being a module it moves with `.to(device)`, and the reversible engine finds its parameters, should it have any.

    Attributes:
        same_for_all: whether every image of a batch is measured alike, so that a batch may be taken apart, which saves
            memory in training; set it where that is so.
        tight: whether A Aᵀ is the identity or a projection, so that A⁺ = Aᵀ and no equations need to be solved; set it
            where that is so.
        tolerance: of the conjugate gradients that A⁺ is else computed by, see `least_squares.System`.
        max_iterations: of these.
    """

    same_for_all = False
    tight = False
    tolerance: float | None = None
    max_iterations = 500

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

    def renew(self) -> None:
        """Find out again what follows from the buffers, such as `tight`: `load_state_dict` has replaced them."""

    def _load_from_state_dict(self, *arguments: Any) -> None:
        super()._load_from_state_dict(*arguments)
        self.renew()

    def A(self, x: Tensor) -> Tensor:
        """Measure images x (batch, 1, H, W)."""
        raise NotImplementedError(f"{type(self).__name__} must define A")

    def A_adjoint(self, y: Tensor) -> Tensor:
        """Aᵀy: images (batch, 1, H, W) from measurements."""
        raise NotImplementedError(f"{type(self).__name__} must define A_adjoint")

    def A_dagger(
        self,
        y: Tensor,
        damping: Tensor | None = None,  # λ ≥ 0 of each image, (batch,) or (1,); None: 0
    ) -> Tensor:
        """Aᵀ(A Aᵀ + λI)⁻¹y; without damping A⁺y, the least-squares image of least norm."""
        if not self.tight:
            return damped_inverse(System(self, self.tolerance, self.max_iterations), y, damping)
        x = self.A_adjoint(y)
        return x if damping is None else x / (1 + per_image(damping, x))

    def check_image(self, x: Tensor, channels: int | None = None) -> None:
        """Raise ValueError unless x is real, (batch, channels, *self.image_shape); None: of any number of channels."""
        if x.is_complex():
            raise ValueError(f"{type(self).__name__} takes real images; give the real and the imaginary part of "
                             "complex ones as two channels")
        wanted = x.shape[1:2] if channels is None else (channels,)
        if x.ndim != 4 or x.shape[1:] != (*wanted, *self.image_shape):
            names = f"batch, {'channels' if channels is None else channels}"
            why = " (complex ones, of two channels)" if channels == 2 else ""
            raise ValueError(f"{type(self).__name__} takes images ({names}, {self.image_shape[0]}, "
                             f"{self.image_shape[1]}){why}, not {tuple(x.shape)}")

    def check_measurements(self, y: Tensor, shape: tuple[int, ...]) -> None:
        """Raise ValueError unless y is (batch, *shape)."""
        if y.shape[1:] != tuple(shape):
            raise ValueError(f"measurements of {type(self).__name__} are (batch, {', '.join(map(str, shape))}), "
                             f"not {tuple(y.shape)}")

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
        self.tight = getattr(operator, "tight", False)

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

    def A_dagger(self, y: Tensor, damping: Tensor | None = None) -> Tensor:
        return self.transform_adjoint(dagger(self.operator, y, damping))


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
        self.tight = all(getattr(operator, "tight", False) for operator in operators)

    def A(self, x: Tensor) -> Tensor:
        return torch.cat([operator.A(image) for operator, image in zip(self._each(x), x.split(1), strict=True)])

    def A_adjoint(self, y: Tensor) -> Tensor:
        return torch.cat([operator.A_adjoint(each) for operator, each in zip(self._each(y), y.split(1), strict=True)])

    def A_dagger(self, y: Tensor, damping: Tensor | None = None) -> Tensor:
        damping = [None] * len(y) if damping is None else damping.expand(len(y)).split(1)
        return torch.cat([dagger(*each) for each in zip(self._each(y), y.split(1), damping, strict=True)])

    def measured(self, y: Tensor) -> float:
        return sum(operator.measured(part) for operator, part in zip(self._each(y), y.split(1), strict=True)) / len(y)

    def _each(self, batch: Tensor) -> nn.ModuleList:
        if len(batch) != len(self.operators):
            raise ValueError(f"there are operators for {len(self.operators)} images, not for {len(batch)}")
        return self.operators
