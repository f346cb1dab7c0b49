"""What every measurement operator is: A takes an image to what the camera records, A_adjoint takes it back.

Methods are named as deepinv names them (A, A_adjoint, A_dagger).  deepinv's linear physics with A Aᵀ = I serve here;
ours serve there as `LinearPhysics(A=operator.A, A_adjoint=operator.A_adjoint)`.
"""
from torch import Tensor, nn


class LinearOperator(nn.Module):
    """Base of all operators with A Aᵀ = I; a subclass gives `A` and `A_adjoint`.

    Being a module it moves with `.to(device)`, and the reversible engine finds its parameters, should it have any.

    Attributes:
        same_for_all: whether every image of a batch is measured alike, so that a batch may be taken apart, which saves
            memory in training; set it where that is so.
    """

    same_for_all = False

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
