"""Our operators as physics of deepinv; the network takes deepinv's physics as they are (see pseudo_inverse.py)."""
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .base import LinearOperator

if TYPE_CHECKING:
    from deepinv.physics import LinearPhysics


def as_deepinv(operator: LinearOperator) -> "LinearPhysics":
    """Return the operator as a `deepinv.physics.LinearPhysics`, with its own A, A_adjoint and A_dagger.

    Raises:
        ImportError: where the package deepinv is not installed.
    """
    try:
        from deepinv.physics import LinearPhysics
    except ImportError as error:
        raise ImportError("as_deepinv needs the package deepinv: pip install deepinv") from error

    class Physics(LinearPhysics):
        def __init__(self):
            super().__init__()
            self.operator = operator

        def A(self, x: Tensor, **_: Any) -> Tensor:
            return self.operator.A(x)

        def A_adjoint(self, y: Tensor, **_: Any) -> Tensor:
            return self.operator.A_adjoint(y)

        def A_dagger(self, y: Tensor, **_: Any) -> Tensor:
            return self.operator.A_dagger(y)

    return Physics()
