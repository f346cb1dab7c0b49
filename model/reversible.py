"""Couplings, and chains of them that run without keeping activations: the engine of invertible training.

A coupling (the paper's "wiring") makes any function f invertible by carrying a second stream along:

    y₁ = (1 − v) f(x₁, *context) + v x₂        x₁ = y₂
    y₂ = x₁                                    x₂ = (y₁ − (1 − v) f(y₂, *context)) / v

Forward, a chain runs its couplings without a graph and keeps its two output streams.  Backward, it walks from the end:
compute f once with a graph, rebuild x from y, and differentiate that one coupling.  Everything f reads that can have a
gradient (streams, v's, context, parameters) is an explicit input of the autograd function and has its gradient
returned, so that accumulation, hooks, DistributedDataParallel and repeated use are autograd's own.

This file knows nothing of images, operators or diffusion.  f must be deterministic: it is computed twice.
"""
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call


class Coupling(nn.Module):
    """y₁ = (1 − v) f(x₁, *context) + v x₂, y₂ = x₁, with a learned scalar v.

    Args:
        body: f, a module that returns a tensor of its first argument's shape.
        v: initial value; the coupling is invertible for every v but 0.
    """

    def __init__(self, body: nn.Module, v: float = 0.5):
        super().__init__()
        self.body = body
        self.v = nn.Parameter(torch.full((1,), v))

    def forward(self, x1: Tensor, x2: Tensor, *context: Any) -> tuple[Tensor, Tensor]:
        fx = self.body(x1, *context).to(x2.dtype)  # the streams keep their precision, whatever f computes in
        return (1 - self.v) * fx + self.v * x2, x1

    def inverse(self, y1: Tensor, y2: Tensor, *context: Any) -> tuple[Tensor, Tensor]:
        fx = self.body(y2, *context).to(y1.dtype)
        return y2, (y1 - (1 - self.v) * fx) / self.v


class ReversibleChain(nn.ModuleList):
    """Couplings one after the other.

    A context, one tuple a coupling, is what f reads beside its stream.  Tensors in it, and parameters and buffers of
    modules in it, are differentiated like all else.  Of other objects the chain takes no notice, so tensors must not
    hide inside them; lists, tuples and dictionaries are refused.
    """

    def forward(
        self,
        x1: Tensor,  # the two streams, of one shape
        x2: Tensor,
        contexts: Sequence[tuple] | None = None,  # one tuple a coupling; None: no coupling has any
        *,
        reversible: bool = True,  # False: plain autograd, which keeps every activation
        store_every: int | None = None,  # keep the streams every k couplings (1: exact); None: invert all
    ) -> tuple[Tensor, Tensor]:
        contexts = self._contexts(contexts)
        if store_every is not None and store_every < 1:
            raise ValueError(f"store_every must be None or at least 1, not {store_every}")
        if not (reversible and torch.is_grad_enabled()):
            for coupling, context in zip(self, contexts, strict=True):
                x1, x2 = coupling(x1, x2, *context)
            return x1, x2
        inputs = _Inputs()
        calls = [_Call.of(coupling, context, inputs) for coupling, context in zip(self, contexts, strict=True)]
        return _Chain.apply(calls, store_every, x1, x2, *inputs.tensors)

    def inverse(self, y1: Tensor, y2: Tensor, contexts: Sequence[tuple] | None = None) -> tuple[Tensor, Tensor]:
        """The streams that `forward` made (y1, y2) of."""
        for coupling, context in zip(reversed(self), reversed(self._contexts(contexts)), strict=True):
            y1, y2 = coupling.inverse(y1, y2, *context)
        return y1, y2

    def _contexts(self, contexts: Sequence[tuple] | None) -> Sequence[tuple]:
        if contexts is None:
            return [()] * len(self)
        if len(contexts) != len(self):
            raise ValueError(f"a chain of {len(self)} couplings takes {len(self)} contexts, not {len(contexts)}")
        return contexts


class _Inputs:
    """The distinct tensors that a chain reads beside its streams, numbered in order of appearance."""

    def __init__(self):
        self.tensors: list[Tensor] = []
        self._numbers: dict[int, int] = {}

    def number(self, tensor: Tensor) -> int:
        if id(tensor) not in self._numbers:
            self._numbers[id(tensor)] = len(self.tensors)
            self.tensors.append(tensor)
        return self._numbers[id(tensor)]


class _Body(nn.Module):
    """f and the modules in its context under one roof, so that functional_call can reach the parameters of all."""

    def __init__(self, body: nn.Module, context_modules: list[nn.Module]):
        super().__init__()
        self.body = body
        self.context_modules = nn.ModuleList(context_modules)

    def forward(self, x: Tensor, *context: Any) -> Tensor:
        return self.body(x, *context)


@dataclass
class _Call:
    """One coupling with every tensor it reads replaced by a number into the chain's inputs."""

    coupling: Coupling
    body: _Body
    v: int
    parameters: dict[str, int]  # and buffers: name in `body` -> number
    tensors: dict[int, int]  # position in the context -> number
    others: dict[int, Any]  # position in the context -> what is not a tensor

    @classmethod
    def of(cls, coupling: Coupling, context: tuple, inputs: _Inputs) -> "_Call":
        for item in context:
            if isinstance(item, Mapping | list | tuple | set):
                raise TypeError(f"a context holds tensors, modules and constants, not a {type(item).__name__}")
        body = _Body(coupling.body, [item for item in context if isinstance(item, nn.Module)])
        named = chain(body.named_parameters(), body.named_buffers())
        return cls(
            coupling=coupling,
            body=body,
            v=inputs.number(coupling.v),
            parameters={name: inputs.number(tensor) for name, tensor in named},
            tensors={i: inputs.number(item) for i, item in enumerate(context) if isinstance(item, Tensor)},
            others={i: item for i, item in enumerate(context) if not isinstance(item, Tensor)},
        )

    def context(self, tensors: Sequence[Tensor] | dict[int, Tensor]) -> list[Any]:
        items = self.others | {i: tensors[number] for i, number in self.tensors.items()}
        return [items[i] for i in range(len(items))]

    def backward(
        self,
        y: tuple[Tensor, Tensor],
        x2: Tensor | None,  # the second input stream where it was stored, else it is rebuilt
        grad1: Tensor,
        grad2: Tensor,
        tensors: Sequence[Tensor],  # the chain's inputs
        wanted: Sequence[bool],  # which of them need a gradient
        autocast: Callable[[], torch.autocast],
    ) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], dict[int, Tensor | None]]:
        """Invert and differentiate: (x₁, x₂), their gradients, and the gradients of the inputs by number."""
        y1, y2 = y
        v = tensors[self.v]
        # Aliases keep the outer graph, and hooks on the real tensors, out of this inner differentiation.
        x1 = y2.detach().requires_grad_()
        numbers = dict.fromkeys([*self.tensors.values(), *self.parameters.values()])
        alias = {n: tensors[n].detach().requires_grad_(wanted[n]) for n in numbers}
        with torch.enable_grad(), autocast():
            parameters = {name: alias[n] for name, n in self.parameters.items()}
            fx = functional_call(self.body, parameters, (x1, *self.context(alias))).to(y1.dtype)
        leaves = {n: a for n, a in alias.items() if a.requires_grad}
        grad_x1, *grads = torch.autograd.grad(fx, [x1, *leaves.values()], (1 - v) * grad1, allow_unused=True) \
            if fx.requires_grad else [None] * (1 + len(leaves))
        fx = fx.detach()
        if x2 is None:
            x2 = (y1 - (1 - v) * fx) / v
        by_number = dict(zip(leaves, grads, strict=True))
        if wanted[self.v]:
            grad_v = (grad1 * (x2 - fx)).sum().reshape(v.shape)
            by_number[self.v] = _plus(by_number.get(self.v), grad_v)
        return (x1.detach(), x2), (_plus(grad_x1, grad2), v * grad1), by_number


class _Chain(torch.autograd.Function):
    @staticmethod
    def forward(ctx, calls: list[_Call], store_every: int | None, x1: Tensor, x2: Tensor, *tensors: Tensor):
        ctx.calls = calls
        device = x1.device.type
        ctx.autocast = (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
        stored = {0: (x1, x2)} if store_every else {}  # number of couplings passed -> streams
        for passed, call in enumerate(calls, start=1):
            x1, x2 = call.coupling(x1, x2, *call.context(tensors))
            if passed == len(calls) or (store_every and passed % store_every == 0):
                stored[passed] = (x1, x2)
        ctx.stored = list(stored)
        ctx.save_for_backward(*tensors, *(stream for pair in stored.values() for stream in pair))
        return x1, x2

    @staticmethod
    @once_differentiable
    def backward(ctx, grad1: Tensor, grad2: Tensor):
        saved, count = ctx.saved_tensors, len(ctx.needs_input_grad) - 4
        tensors, streams = saved[:count], saved[count:]
        stored = dict(zip(ctx.stored, zip(streams[::2], streams[1::2], strict=True), strict=True))
        wanted = ctx.needs_input_grad[4:]
        grads: list[Tensor | None] = [None] * count

        def autocast() -> torch.autocast:
            device, dtype, enabled = ctx.autocast
            return torch.autocast(device, dtype, enabled, cache_enabled=False)  # each alias is cast once only

        x = None
        for passed in range(len(ctx.calls), 0, -1):
            y = stored.get(passed, x)
            x2 = stored[passed - 1][1] if passed - 1 in stored else None
            x, (grad1, grad2), by_number = ctx.calls[passed - 1].backward(
                y, x2, grad1, grad2, tensors, wanted, autocast
            )
            for number, grad in by_number.items():
                grads[number] = _plus(grads[number], grad)
        return None, None, grad1, grad2, *grads


def _plus(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """a + b, where None stands for zero."""
    if a is None or b is None:
        return b if a is None else a
    return a + b
