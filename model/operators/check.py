"""Whether an operator keeps its word: A_adjoint is Aᵀ, A⁺ is A⁺, images are real."""
import warnings
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake

from .pseudo_inverse import dagger


class OperatorError(ValueError):
    """An operator that contradicts itself; the message says in what, and by how much."""


PSEUDO_INVERSE_BOUND = 1e-2  # relative; what is left of an ill-conditioned operator is allowed
PROJECTION_BOUND = 0.1  # and what a little damping does to its smallest singular values
_checked: WeakSet[nn.Module] = WeakSet()


def check_operator(
    operator: nn.Module,  # ours or another library's, with A and A_adjoint
    image_shape: tuple[int, ...],  # (H, W), (channels, H, W) or (batch, channels, H, W); what is left out is 1
) -> None:
    """Raise OperatorError where Aᵀ is not the adjoint of A, A⁺ not its pseudo-inverse, or images are not real numbers.

    A random image decides, always the same one; the global random state is left alone.  It costs about four A and Aᵀ.
    """
    shape = (1,) * (4 - len(image_shape)) + tuple(image_shape)
    tensors = [tensor for tensor in (*operator.parameters(), *operator.buffers()) if tensor.is_floating_point()]
    _check(operator, _random(shape, tensors[0] if tensors else torch.zeros(())))


def warn_if_wrong(operator: nn.Module, like: Tensor) -> None:
    """Check an operator on images of the shape of `like` (batch, channels, H, W), once; warn where it fails."""
    if operator in _checked or torch.compiler.is_compiling() or like.is_meta or is_fake(like):
        return
    _checked.add(operator)
    try:
        _check(operator, _random(like[:1].shape if getattr(operator, "same_for_all", False) else like.shape, like))
    except OperatorError as error:
        warnings.warn(f"{error}; what is reconstructed will be wrong", stacklevel=3)


@torch.no_grad()
def _check(operator: nn.Module, x: Tensor) -> None:
    name, rounding = type(operator).__name__, torch.finfo(x.dtype).eps ** 0.5
    y = operator.A(x)
    scale = y.norm()
    if len(y) != len(x):
        raise OperatorError(f"{name}.A makes {len(y)} measurements of {len(x)} images; the batch must come first")
    if not scale.isfinite() or scale == 0:
        raise OperatorError(f"the measurement of a random image by {name} is of norm {float(scale):g}")
    v = y / scale + (noise := _random(y.shape, y, seed=1)) / noise.norm()
    back = operator.A_adjoint(v)
    if back.is_complex() or back.shape != x.shape:
        raise OperatorError(f"{name}.A_adjoint makes {tuple(back.shape)} of {back.dtype}, where images are "
                            f"{tuple(x.shape)} and real; complex images are two channels")
    forth = (y.conj() * v).sum().real
    error = float((forth - (x * back).sum()).abs() / (scale * v.norm()))
    if not error <= rounding:
        raise OperatorError(f"{name}.A_adjoint is not the adjoint of A: <A x, v> and <x, A_adjoint v> differ by "
                            f"{error:.1g} of |A x| |v|")
    inverse = dagger(operator, y)
    error = float((operator.A(inverse) - y).norm() / scale)
    if not error <= PSEUDO_INVERSE_BOUND:
        claim = " (it claims to be tight)" if getattr(operator, "tight", False) else ""
        raise OperatorError(f"A A⁺A = A does not come true for {name}{claim}: it is off by {error:.1g} of |A x|")
    error = float((inverse * (x - inverse)).sum().abs() / (inverse.norm() * x.norm()))
    if not error <= PROJECTION_BOUND:
        raise OperatorError(f"A⁺A of {name} is no orthogonal projection: A_dagger gives an image that is not of least "
                            f"norm (<A⁺A x, x - A⁺A x> is {error:.1g} of |A⁺A x| |x|)")


def _random(shape: tuple[int, ...], like: Tensor, seed: int = 0) -> Tensor:
    """Normal numbers, the same each time, of the precision and on the device of `like`."""
    dtype = like.dtype if like.dtype.is_complex or like.dtype.is_floating_point else torch.float32
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype, device="cpu").to(like.device)
