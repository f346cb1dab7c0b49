"""Chains of couplings that run without keeping activations: the engine of invertible training.

A coupling turns two streams into two others and back (couplings.py).  Forward, a chain runs its couplings without a
graph and keeps its two output streams.  Backward, it walks from the end: rebuild a coupling's input from its output,
compute the coupling once more with a graph, and differentiate it alone.  Everything a coupling reads that can have a
gradient (streams, context, parameters) is an explicit input of the autograd function and has its gradient returned, so
that accumulation, hooks, DistributedDataParallel and repeated use are autograd's own.

This file knows nothing of images, operators, diffusion, or what a coupling computes.  A coupling must be deterministic,
for it is computed twice, and one thread at a time may differentiate a module.
"""
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import get_gradient_edge


class ReversibleChain(nn.ModuleList):
    """Couplings one after the other: modules with a `forward` and an `inverse` (see couplings.py).

    A context, one tuple a coupling, is what it reads beside its streams; it may hold tuples in turn.  Tensors in it,
    and parameters and buffers of modules in it, are differentiated like all else.  Nowhere else may a tensor hide that
    needs a gradient, which would be lost: objects and modules with one among their attributes, or in a list, tuple or
    dictionary there, are refused, and so are contexts with lists and dictionaries.  What lies deeper, or in a closure,
    is not found.
    """

    def forward(
        self,
        x1: Tensor,  # the two streams, of one shape and precision
        x2: Tensor,
        contexts: Sequence[tuple] | None = None,  # one tuple a coupling; None: no coupling has any
        *,
        reversible: bool = True,  # False: plain autograd, which keeps every activation
        store_every: int | None = None,  # keep the streams every k couplings (1: exact); None: invert all
        keep_last: bool = False,  # keep the last coupling's graph: it is computed once, and held till backward
    ) -> tuple[Tensor, Tensor]:
        """(y1, y2), the streams after the last coupling.

        Raises:
            ValueError: for a wrong number of contexts, or an impossible `store_every`.
            TypeError: where something that needs a gradient is hidden in a context or in a module.
            RuntimeError: in backward, where two threads differentiate one module at once.
        """
        contexts = self._contexts(contexts)
        if store_every is not None and store_every < 1:
            raise ValueError(f"store_every must be None or at least 1, not {store_every}")
        if not (reversible and torch.is_grad_enabled()):
            for coupling, context in zip(self, contexts, strict=True):
                x1, x2 = coupling(x1, x2, *context)
            return x1, x2
        inputs = _Inputs()
        calls = [_Call.of(coupling, context, inputs) for coupling, context in zip(self, contexts, strict=True)]
        return _Chain.apply(calls, store_every, keep_last, x1, x2, *inputs.tensors)

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


Streams = tuple[Tensor, Tensor]
Slot = tuple[dict[str, Tensor | None], str, int]  # where a module keeps a tensor: dictionary, name; and its number


@dataclass
class _Number:
    """Of a tensor among a chain's inputs."""

    value: int


@contextmanager
def holding(wanted: Iterable[tuple[dict[str, Tensor | None], str, Tensor | None]]) -> Iterator[None]:
    """Modules' dictionaries of tensors hold the wanted ones under these names, and afterwards their own again."""
    own = []
    try:
        for held, name, tensor in wanted:
            if held[name] is tensor:
                continue
            if getattr(held[name], "is_stand_in", False):
                raise RuntimeError("two threads differentiate one module at once")
            own.append((held, name, held[name]))
            held[name] = tensor
        yield
    finally:
        for held, name, tensor in own:
            held[name] = tensor


class _Inputs:
    """The distinct tensors that a chain reads beside its streams, numbered in order of appearance."""

    def __init__(self):
        self.tensors: list[Tensor] = []
        self._numbers: dict[int, int] = {}  # by the tensor's id
        self._slots: dict[int, list[Slot]] = {}  # by the module's id

    def number(self, tensor: Tensor) -> int:
        if id(tensor) not in self._numbers:
            self._numbers[id(tensor)] = len(self.tensors)
            self.tensors.append(tensor)
        return self._numbers[id(tensor)]

    def slots(self, module: nn.Module) -> list[Slot]:
        """Where the module and those within it keep their parameters and buffers."""
        if id(module) not in self._slots:
            for part in module.modules():
                _check_for_hidden(part)
            self._slots[id(module)] = [
                (held, name, self.number(tensor)) for part in module.modules()
                for held in (part._parameters, part._buffers) for name, tensor in held.items() if tensor is not None]
        return self._slots[id(module)]


@dataclass
class _Call:
    """One coupling and its context, with the tensors it reads replaced by their numbers among the chain's inputs."""

    coupling: nn.Module
    context: tuple  # _Number in place of a tensor
    slots: list[list[Slot]]  # of the coupling and of each module in the context

    @classmethod
    def of(cls, coupling: nn.Module, context: tuple, inputs: _Inputs) -> "_Call":
        slots = [inputs.slots(coupling)]

        def numbered(item: Any) -> Any:
            if isinstance(item, tuple):
                return tuple(map(numbered, item))
            if isinstance(item, Mapping | list | set):
                raise TypeError(f"a context holds tensors, modules, constants and tuples, not a {type(item).__name__}")
            if isinstance(item, Tensor):
                return _Number(inputs.number(item))
            if isinstance(item, nn.Module):
                slots.append(inputs.slots(item))
            else:
                _check_for_hidden(item)
            return item

        return cls(coupling, numbered(tuple(context)), slots)

    def context_of(self, tensors: Sequence[Tensor]) -> tuple:
        def filled(item: Any) -> Any:
            if isinstance(item, tuple):
                return tuple(map(filled, item))
            return tensors[item.value] if isinstance(item, _Number) else item

        return filled(self.context)

    def graph(
        self,
        x: Streams | None,  # None: rebuilt from y
        y: Streams | None,
        leaves: Sequence[Tensor],  # stand-ins for the chain's inputs
        autocast: torch.autocast,
    ) -> tuple[Streams, Streams]:
        """The coupling with a graph: x, which are leaves of it, and y."""
        coupling, context = self.coupling, self.context_of(leaves)
        # The modules read the stand-ins in place of their own tensors, and what they had in forward of all others.
        with holding((held, name, leaves[number]) for slots in self.slots for held, name, number in slots), autocast:
            if x is None and hasattr(coupling, "rebuild"):
                with torch.enable_grad():
                    return coupling.rebuild(*y, *context)
            if x is None:
                with torch.no_grad():
                    x = coupling.inverse(*y, *context)
            with torch.enable_grad():
                x = tuple(stream.detach().requires_grad_() for stream in x)
                return x, tuple(coupling(*x, *context))


class _Chain(torch.autograd.Function):
    @staticmethod
    def forward(ctx, calls: list[_Call], store_every: int | None, keep_last: bool, x1: Tensor, x2: Tensor,
                *tensors: Tensor):
        ctx.calls, ctx.last = calls, None
        device = x1.device.type
        ctx.autocast = (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
        stored = {0: (x1, x2)} if store_every else {}  # number of couplings passed -> streams
        for passed, call in enumerate(calls, start=1):
            if keep_last and passed == len(calls):
                leaves, own = _leaves(tensors)
                graph = call.graph((x1, x2), None, leaves, _autocast(ctx))
                ctx.last = leaves, own, graph
                streams = {id(leaf): stream for leaf, stream in zip(graph[0], (x1, x2), strict=True)}
                x1, x2 = (streams[id(new)] if id(new) in streams else new.detach() for new in graph[1])
            else:
                x1, x2 = call.coupling(x1, x2, *call.context_of(tensors))
            if passed == len(calls) or (store_every and passed % store_every == 0):
                stored[passed] = (x1, x2)
        ctx.stored = list(stored)
        ctx.save_for_backward(*tensors, *(stream for pair in stored.values() for stream in pair))
        return x1, x2

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor):
        count = len(ctx.needs_input_grad) - 5
        saved = ctx.saved_tensors  # once: each reading of it unpacks all, which checkpointing allows once only
        tensors, streams = saved[:count], saved[count:]
        stored = dict(zip(ctx.stored, zip(streams[::2], streams[1::2], strict=True), strict=True))
        leaves, own, graph = ctx.last or (*_leaves(tensors), None)
        ctx.last = None  # its graph can be walked once only
        needed = [leaf for leaf in leaves if leaf.requires_grad]
        x = None
        for passed in range(len(ctx.calls), 0, -1):
            if graph is None:
                y = stored.pop(passed, x)
                graph = ctx.calls[passed - 1].graph(stored.get(passed - 1), y, leaves, _autocast(ctx))
            x, y = graph
            graph = None
            y = tuple(map(get_gradient_edge, y))  # of y itself nothing needs to be held while the graph is walked
            torch.autograd.backward(y, grads, inputs=[*x, *needed])  # adds to the leaves' gradients
            grads, x = tuple(stream.grad for stream in x), tuple(stream.detach() for stream in x)
        found = (leaf.grad if is_own else None for leaf, is_own in zip(leaves, own, strict=True))
        return None, None, None, *grads, *found


def _check_for_hidden(item: Any) -> None:
    """Refuse what holds a tensor whose gradient would be lost."""
    for name, value in getattr(item, "__dict__", {}).items():
        if isinstance(value, (dict, list, tuple)):
            if not value or name in ("_parameters", "_buffers", "_modules"):
                continue
            hidden = any(isinstance(each, Tensor) and each.requires_grad
                         for each in (value.values() if isinstance(value, dict) else value))
        else:
            hidden = isinstance(value, Tensor) and value.requires_grad
        if hidden:
            raise TypeError(f"{type(item).__name__}.{name} needs a gradient, which would be lost, as it is neither a "
                            "parameter nor a buffer of a module; register it, or detach it")


def _leaves(tensors: Sequence[Tensor]) -> tuple[list[Tensor], list[bool]]:
    """Stand-ins that keep the outer graph, and hooks on the real tensors, out of the inner differentiation.

    What is a stand-in already, of a chain around this one, serves this one too (then False in the second list): its
    gradient is added to in place, and not made twice.
    """
    own = [tensor.requires_grad and not getattr(tensor, "is_stand_in", False) for tensor in tensors]
    leaves = [tensor.detach().requires_grad_() if is_own else tensor
              for tensor, is_own in zip(tensors, own, strict=True)]
    for leaf, is_own in zip(leaves, own, strict=True):
        if is_own:
            leaf.is_stand_in = True
    return leaves, own


def _autocast(ctx) -> torch.autocast:
    device, dtype, enabled = ctx.autocast
    return torch.autocast(device, dtype, enabled, cache_enabled=False)  # each stand-in is cast once only
