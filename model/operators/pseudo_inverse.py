"""A⁺ of whatever operator the network is given: ours, another library's, or a module with just A and A_adjoint."""
import inspect
from enum import Enum, auto
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from ..recompute import refuse_hidden
from .least_squares import System, damped_inverse, per_image

ROUNDING = 1e-2  # relative; another library's iterations may stop there


class Way(Enum):
    """How A⁺ of an operator is computed."""

    OWN = auto()  # its A_dagger takes a damping, as ours do
    ADJOINT = auto()  # A⁺ = Aᵀ
    A_DAGGER = auto()  # its A_dagger is A⁺, but takes no damping
    SOLVE = auto()  # it has no A_dagger, or one that is not A⁺, such as filtered back-projection


_ways: WeakKeyDictionary[nn.Module, Way] = WeakKeyDictionary()


def dagger(
    operator: nn.Module,  # with A and A_adjoint
    y: Tensor,  # measurements, batch first
    damping: Tensor | None = None,  # λ ≥ 0 of each image, (batch,) or (1,); None: 0
) -> Tensor:
    """Return Aᵀ(A Aᵀ + λI)⁻¹y, which is A⁺y without damping, images (batch, channels, H, W)."""
    way = way_of(operator, y)
    if way is Way.OWN:
        return operator.A_dagger(y) if damping is None else operator.A_dagger(y, damping)
    if way is Way.SOLVE or (way is Way.A_DAGGER and damping is not None and damping.any()):
        return damped_inverse(System(operator), y, damping)
    x = operator.A_adjoint(y) if way is Way.ADJOINT else operator.A_dagger(y)
    return x if damping is None else x / (1 + per_image(damping, x))  # of A_DAGGER it is 0, and has its derivative


def way_of(operator: nn.Module, y: Tensor) -> Way:
    """Return how A⁺ of an operator is computed; of one that is not ours a random image decides, once."""
    if _takes_damping(operator):
        return Way.OWN
    if operator not in _ways:
        _ways[operator] = _measured_way(operator, y)
    return _ways[operator]


def is_tight(operator: nn.Module, y: Tensor) -> bool:
    """Return whether A⁺ = Aᵀ, as the operator says or, of another library, as a random image shows."""
    return getattr(operator, "tight", False) or way_of(operator, y) is Way.ADJOINT


def _takes_damping(operator: nn.Module) -> bool:
    method = getattr(operator, "A_dagger", None)
    return method is not None and "damping" in inspect.signature(method).parameters


@torch.no_grad()
def _measured_way(operator: nn.Module, y: Tensor) -> Way:
    """Of images t in the range of Aᵀ, A⁺A t = t."""
    x = operator.A_adjoint(y)
    x = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(x)
    t = operator.A_adjoint(operator.A(x))

    def returns(back: Tensor) -> bool:
        return back.shape == t.shape and bool((back - t).norm() <= ROUNDING * t.norm())

    seen = operator.A(t)
    if returns(operator.A_adjoint(seen)):
        return Way.ADJOINT
    own = hasattr(operator, "A_dagger") and returns(operator.A_dagger(seen)) and _differentiable(operator, seen)
    return Way.A_DAGGER if own else Way.SOLVE


def _differentiable(operator: nn.Module, y: Tensor) -> bool:
    """Return whether A_dagger's graph leads to y and what the operator keeps, and to nothing else.

    A solver of deepinv reads a tensor of its own, by which it notices backward; the engine would refuse it.
    """
    y = y.detach().requires_grad_()
    with torch.enable_grad():
        x = operator.A_dagger(y)
    known = [y, *operator.parameters(), *operator.buffers()]
    try:
        refuse_hidden([get_gradient_edge(x)] if x.requires_grad else [], known)
    except TypeError:
        return False
    return x.requires_grad
