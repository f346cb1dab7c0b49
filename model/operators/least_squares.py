"""A⁺ of any linear operator by conjugate gradients, differentiable by the adjoint solve.

With damping λ ≥ 0,  x = Aᵀ(A Aᵀ + λI)⁻¹ y = (AᵀA + λI)⁻¹ Aᵀy;  at λ = 0 it is A⁺y, also where A Aᵀ has no inverse, for
the iteration starts at 0, never leaves the range of Aᵀ, and does not see the part of y that A cannot make.
"""
import warnings
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class System:
    """A linear map with its adjoint, and when to stop: ‖Aᵀ(y − A x) − λx‖ ≤ tolerance ‖Aᵀy‖, for each image."""

    operator: nn.Module  # anything with A and A_adjoint
    tolerance: float | None = None  # None: the precision's eps^(3/4); 6e-6 in fp32, 2e-12 in fp64
    max_iterations: int = 500
    transposed: bool = False

    @property
    def T(self) -> "System":
        return replace(self, transposed=not self.transposed)

    def A(self, x: Tensor) -> Tensor:
        return self.operator.A_adjoint(x) if self.transposed else self.operator.A(x)

    def A_adjoint(self, y: Tensor) -> Tensor:
        return self.operator.A(y) if self.transposed else self.operator.A_adjoint(y)


def damped_inverse(
    system: System,
    y: Tensor,  # measurements, batch first, real or complex
    damping: Tensor | None = None,  # λ ≥ 0, (batch,) or (1,); None: 0
) -> Tensor:
    """Return Aᵀ(A Aᵀ + λI)⁻¹y, images (batch, …), to the tolerance; it warns where `max_iterations` do not suffice.

    Gradients with respect to y, λ, and what of the operator's parameters and buffers learns are exact to the tolerance
    too: they solve with Aᵀ in place of A.  Where A learns they assume that its rank stays, as else there are none.
    """
    tensors = _tensors_of(system.operator)
    with torch.autocast(y.device.type, enabled=False):
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
            return _learned(system, tensors, y, damping)
        return _Solve.apply(system, tensors, y, damping)


def per_image(numbers: Tensor, like: Tensor) -> Tensor:
    """Numbers (batch,) or (1,), shaped and typed to be combined with a batch (batch, …)."""
    return numbers.to(like.dtype).view(-1, *[1] * (like.ndim - 1))


def inverse_gain(s: Tensor, damping: Tensor | None, like: Tensor) -> Tensor:
    """s/(s² + λ), and 0 where s is below √eps of the largest: what a measurement's coefficients are multiplied by.

    Args:
        s: singular values, of any shape.
        damping: λ, (batch,) or (1,), or None.
        like: the measurements (batch, …), of as many dimensions as the result shall have.
    """
    seen = s > torch.finfo(s.dtype).eps ** 0.5 * s.max()
    power = torch.where(seen, s.square(), 1)
    if damping is not None:
        power = power + per_image(damping, like).to(s.dtype)
    return torch.where(seen, s, 0) / power


def conjugate_gradients(system: System, y: Tensor, damping: Tensor | None) -> Tensor:
    """Return (AᵀA + λI)⁻¹Aᵀy by the method of Hestenes and Stiefel for least squares (CGLS), each image on its own.

    An image that has converged is left alone, so that it comes out the same in every batch.
    """
    s = system.A_adjoint(y)
    x, r, p = torch.zeros_like(s), y, s
    gamma = _squared_norm(s)
    tolerance = torch.finfo(s.dtype).eps ** 0.75 if system.tolerance is None else system.tolerance
    goal = tolerance**2 * gamma
    for _ in range(system.max_iterations):
        active = gamma > goal
        if not active.any():
            return x
        q = system.A(p)
        curvature = _squared_norm(q)
        if damping is not None:
            curvature = curvature + damping.to(gamma.dtype) * _squared_norm(p)
        active = active & (curvature > 0)
        alpha = torch.where(active, gamma / curvature, 0)
        x = x + per_image(alpha, x) * p
        r = r - per_image(alpha, r) * q
        s = system.A_adjoint(r)
        if damping is not None:
            s = s - per_image(damping, x) * x
        gamma, before = torch.where(active, _squared_norm(s), 0), gamma
        p = s + per_image(torch.where(active, gamma / before, 0), p) * p
    if (gamma > goal).any():
        warnings.warn(f"conjugate gradients stopped after {system.max_iterations} iterations short of their tolerance: "
                      "the operator is ill-conditioned; raise its tolerance or max_iterations", stacklevel=2)
    return x


class _Solve(torch.autograd.Function):
    """x = (AᵀA + λI)⁻¹Aᵀy with respect to y and λ, A fixed."""

    @staticmethod
    def forward(ctx, system: System, tensors: list[Tensor], y: Tensor, damping: Tensor | None) -> Tensor:
        x = conjugate_gradients(system, y, damping)
        ctx.system, ctx.tensors, ctx.versions = system, tensors, _versions(tensors)
        ctx.save_for_backward(x, damping)
        return x

    @staticmethod
    def backward(ctx, grad: Tensor):
        _check_unchanged(ctx)
        x, damping = ctx.saved_tensors
        if torch.is_grad_enabled() and ctx.needs_input_grad[3]:
            raise RuntimeError("A_dagger has no second derivatives with respect to its damping")
        w = _Solve.apply(ctx.system.T, ctx.tensors, grad, damping)  # (A Aᵀ + λI)⁻¹A g
        wanted = ctx.needs_input_grad[3]
        return None, None, w, _to_damping(conjugate_gradients(ctx.system.T, x, None), w, damping) if wanted else None


def _learned(system: System, tensors: list[Tensor], y: Tensor, damping: Tensor | None) -> Tensor:
    """The same, with respect to what A learns too.

    With z = Aᵀ⁺x, o = y − A x − λz (what of y A cannot make), and in backward w = (A Aᵀ + λI)⁻¹A g,
        ⟨g, dx⟩ = −⟨w, dA x⟩ + ⟨z, dA (g − Aᵀw)⟩ + ⟨o, dA (A⁺w + g₀/λ)⟩,
    where g₀ is the part of g that A maps to 0, and g₀/λ is of λ > 0 alone.
    """
    with torch.no_grad():
        x = conjugate_gradients(system, y, damping)
        z = conjugate_gradients(system.T, x, None)
        outside = y - system.A(x)
        if damping is not None:
            outside = outside - per_image(damping, z) * z
    return _SolveLearned.apply(system, tensors, (x, z), y, damping,
                               system.A(x), system.A_adjoint(z), system.A_adjoint(outside))


class _SolveLearned(torch.autograd.Function):
    """Hands gradients on to A x, Aᵀz and Aᵀo, of which autograd makes those of what A learns."""

    @staticmethod
    def forward(ctx, system: System, tensors: list[Tensor], solved: tuple[Tensor, Tensor], y: Tensor,
                damping: Tensor | None, *reads: Tensor) -> Tensor:
        x, z = solved
        ctx.system, ctx.tensors, ctx.versions = system, tensors, _versions(tensors)
        ctx.save_for_backward(z, damping)
        return x

    @staticmethod
    def backward(ctx, grad: Tensor):
        _check_unchanged(ctx)
        if torch.is_grad_enabled():
            raise RuntimeError("A_dagger of an operator that learns has no second derivatives")
        z, damping = ctx.saved_tensors
        w = conjugate_gradients(ctx.system.T, grad, damping)
        seen = ctx.system.A_adjoint(w)
        u = conjugate_gradients(ctx.system, w, None)  # A⁺w
        if damping is None:
            return None, None, None, w, None, -w, grad - seen, u
        lam = per_image(damping, u)
        unseen = torch.where(lam > 0, (grad - seen - lam * u) / lam.where(lam > 0, 1), 0)  # g₀/λ
        return None, None, None, w, _to_damping(z, w, damping), -w, grad - seen, u + unseen


def _to_damping(z: Tensor, w: Tensor, damping: Tensor) -> Tensor:
    """The gradient of λ: dx/dλ = −(AᵀA + λI)⁻¹x, and x = Aᵀz."""
    found = -_inner(z, w).to(damping.dtype)
    return found if len(damping) == len(found) else found.sum(0, keepdim=True)


def _tensors_of(operator: nn.Module) -> list[Tensor]:
    return [*operator.parameters(), *operator.buffers()] if isinstance(operator, nn.Module) else []


def _versions(tensors: list[Tensor]) -> list[int]:
    """How often each was changed in place; tensors of inference mode do not count."""
    return [0 if tensor.is_inference() else tensor._version for tensor in tensors]


def _check_unchanged(ctx) -> None:
    """Refuse to solve with other numbers than forward did, be they changed in place or put in another's stead."""
    now = _tensors_of(ctx.system.operator)
    same = len(now) == len(ctx.tensors) and all(
        a.data_ptr() == b.data_ptr() or torch.equal(a, b) for a, b in zip(now, ctx.tensors, strict=True))
    if not same or _versions(ctx.tensors) != ctx.versions:
        raise RuntimeError(f"the {type(ctx.system.operator).__name__} has been changed between A_dagger and its "
                           "gradient; differentiate first")


def _squared_norm(a: Tensor) -> Tensor:
    return _inner(a, a)


def _inner(a: Tensor, b: Tensor) -> Tensor:
    """(batch,), real."""
    product = (a.conj() * b).real if a.is_complex() else a * b
    return product.flatten(1).sum(1)
