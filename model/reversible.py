"""Chains of couplings that run without keeping activations: the engine of invertible training.

A coupling turns two streams into two others and back (couplings.py).  Forward, a chain runs its couplings without a
graph and keeps the streams between them, or fewer.  Backward, it walks from the end: compute a coupling once more with
a graph, on the streams that were kept or, where they were not, on streams rebuilt from the coupling's output, and
differentiate it alone.  Everything a coupling reads that can have a gradient (streams, context, parameters) is an
explicit input of the autograd function and has its gradient returned, so that accumulation, hooks,
DistributedDataParallel and repeated use are autograd's own.  What it takes to compute a coupling twice is in
recompute.py.  This file knows nothing of images, operators, diffusion, or what a coupling computes.
"""
import threading
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from .recompute import Call, Inputs, Tensors, refuse_hidden, version_of

Streams = tuple[Tensor, Tensor]
BEARABLE = 0.1  # growth of rounding errors times the precision, above which gradients of an inverted chain are off


class ReversibleChain(nn.ModuleList):
    """Couplings one after the other: modules with a `forward` and an `inverse` (see couplings.py).

    A context, one tuple a coupling, is what it reads beside its streams; it may hold tuples in turn.  Tensors in it,
    and parameters and buffers of modules in it, are differentiated like all else.  A tensor that needs a gradient and
    that a coupling takes from elsewhere is refused in backward; so is what is not computed alike twice.
    """

    def forward(
        self,
        x1: Tensor,  # the two streams, of one shape and precision
        x2: Tensor,
        contexts: Sequence[tuple] | None = None,  # one tuple a coupling; None: no coupling has any
        *,
        reversible: bool = True,  # False: plain autograd, which keeps every activation
        store_every: int | None = 1,  # keep the streams every k couplings (1: exact); None: invert all
        keep_last: int = 0,  # keep the graphs of so many couplings at the end, which are then computed once
    ) -> Streams:
        """Return (y1, y2), the streams after the last coupling.

        Raises:
            ValueError: for a wrong number of contexts, an impossible `store_every`, or a coupling that has no inverse
                where it is needed.
            TypeError: where a gradient would be lost.
            RuntimeError: in backward, where a coupling computes something else than in forward.
        """
        contexts = self._contexts(contexts)
        if store_every is not None and store_every < 1:
            raise ValueError(f"store_every must be None or at least 1, not {store_every}")
        if reversible and torch.is_grad_enabled():
            inputs = Inputs()
            calls = [Call.of(coupling, context, inputs, x1.device.type)
                     for coupling, context in zip(self, contexts, strict=True)]
            if calls and any(tensor.requires_grad for tensor in (x1, x2, *inputs.tensors)):
                run = _Run(calls, inputs, store_every, int(keep_last))
                run.check_inversion(x1)
                return _Recomputed.apply(run, x1, x2, *run.differentiable)
        x1, x2 = x1.view_as(x1), x2.view_as(x2)  # gradients are summed up in the same order as where it is reversible
        for coupling, context in zip(self, contexts, strict=True):
            x1, x2 = coupling(x1, x2, *context)
        return x1, x2

    def inverse(self, y1: Tensor, y2: Tensor, contexts: Sequence[tuple] | None = None) -> Streams:
        """Return the streams that `forward` made (y1, y2) of."""
        for coupling, context in zip(reversed(self), reversed(self._contexts(contexts)), strict=True):
            y1, y2 = coupling.inverse(y1, y2, *context)
        return y1, y2

    def _contexts(self, contexts: Sequence[tuple] | None) -> Sequence[tuple]:
        if contexts is None:
            return [()] * len(self)
        if len(contexts) != len(self):
            raise ValueError(f"a chain of {len(self)} couplings takes {len(self)} contexts, not {len(contexts)}")
        return contexts


def recomputed(module: nn.Module, *x: Tensor, keep: bool = False) -> Tensor | Tensors:
    """Return module(*x), of which nothing is kept but x: what it computes on the way is computed again for backward.

    With `keep` its graph is kept all the same; within a chain its parameters' gradients are then added up as they come.
    """
    inputs = Inputs()
    call = Call.of(module, (), inputs, x[0].device.type)
    if not torch.is_grad_enabled() or not any(tensor.requires_grad for tensor in (*x, *inputs.tensors)):
        return module(*x)
    run = _Run([call], inputs, store_every=1, keep_last=int(keep))
    y = _Recomputed.apply(run, *x, *run.differentiable)
    return y[0] if len(y) == 1 else y


class _Run:
    """What one pass through a chain leaves for its backward."""

    def __init__(self, calls: list[Call], inputs: Inputs, store_every: int | None, keep_last: int):
        count = len(calls)
        self.calls = calls
        self.stored = [i for i in range(count) if store_every and i % store_every == 0]  # whose streams are kept
        self.kept_from = max(0, count - keep_last)  # from here on the graphs are
        self.tensors: list[Tensor | None] = inputs.tensors
        self.differentiable = [tensor for tensor in inputs.tensors if tensor.requires_grad]
        # What a module keeps stays where it is; all else is saved as autograd saves, which may move it elsewhere.
        self.saved = [number for number, tensor in enumerate(inputs.tensors)
                      if not (number in inputs.of_modules and tensor.is_leaf)]
        self.versions: dict[int, int] = {}  # of what is not saved
        readers = Counter(number for call in calls for number in call.numbers)
        self.shared = {number for number, count in readers.items() if count > 1}  # inputs that several calls read
        self.graphs: list[tuple[Tensors, Tensors]] = []
        self.sums: _Sums | None = None  # of the gradients, with the stand-ins that these graphs read
        self.outer: _Sums | None = _Sums.being_made()

    def forward(self, x: Tensors) -> tuple[Tensors, dict[int, Tensors]]:
        """Return the streams after the last coupling, and those to be kept: couplings passed -> streams."""
        streams = {}
        for i, call in enumerate(self.calls):
            if i in self.stored:
                streams[i] = x
            if i < self.kept_from:
                x = call.first(x, self.tensors)
            else:
                self.sums = _Sums(self.tensors, self.shared) if self.sums is None else self.sums
                leaves = _leaves(x)
                with self.sums.making():
                    y = call.first(leaves, self.sums.leaves, graph=True)
                self.graphs.append((leaves, y))
                own = {id(leaf): stream for leaf, stream in zip(leaves, x, strict=True)}
                x = tuple(own[id(each)] if id(each) in own else each.detach() for each in y)
            if i not in self.stored and (call.random or call.updated):
                raise RuntimeError(f"coupling {i + 1} of the chain draws random numbers or updates buffers, and cannot "
                                   "be inverted; use store_every=1")
        if len(self.calls) - 1 not in self.stored:
            streams[len(self.calls)] = x
        updated = {number for call in self.calls for number in call.updated}
        self.versions = {number: version_of(tensor) for number, tensor in enumerate(self.tensors)
                         if number not in self.saved and number not in updated}
        return x, streams

    def take_back(self, saved: Sequence[Tensor]) -> list[Tensor]:
        """Return all inputs, the saved ones among them.

        Raises:
            RuntimeError: where one was modified in place.
        """
        tensors = list(self.tensors)
        for number, tensor in zip(self.saved, saved, strict=True):
            tensors[number] = tensor
        for number, version in self.versions.items():
            if version_of(tensors[number]) != version:
                raise RuntimeError("a parameter or buffer needed for gradient computation has been modified by an "
                                   f"inplace operation: its shape is {tuple(tensors[number].shape)}")
        return tensors

    def check_inversion(self, x: Tensor) -> None:
        """Refuse to rebuild streams from couplings that have no inverse, warn where rounding errors grow too large."""
        factors = {i: getattr(call.module, "amplification", None) for i, call in enumerate(self.calls[:self.kept_from])
                   if i not in self.stored}
        factors = {i: factor for i, factor in factors.items() if factor is not None}
        if not factors or isinstance(x, FakeTensor) or x.is_meta:
            return
        growth = largest = 1.0
        for i, factor in zip(factors, torch.stack(list(factors.values())).flatten().tolist(), strict=True):
            growth = factor if i - 1 in self.stored else growth * factor
            largest = max(largest, growth)
        if largest == float("inf"):
            raise ValueError("a coupling with v = 0 has no inverse; use store_every=1, which needs none")
        if largest * self.calls[0].precision(x) > BEARABLE:
            warnings.warn("streams are rebuilt by dividing by one v after another, and the product of 1/v exceeds what "
                          "the precision bears: gradients are wrong; use store_every=1", stacklevel=3)

    def check_alike(self, differences: dict[int, Tensor], x: Tensor) -> None:
        """Raise RuntimeError where the second results are not the first; the differences are relative."""
        if not differences:
            return
        limit = max(1e-3, 16 * self.calls[0].precision(x))
        for i, difference in zip(differences, torch.stack(list(differences.values())).tolist(), strict=True):
            if difference > limit:
                raise RuntimeError(
                    f"module {i + 1} of the chain ({type(self.calls[i].module).__name__}) computed something else in "
                    f"backward than in forward, {difference:.1e} away: it may depend on its arguments, parameters, "
                    "buffers and torch's global random numbers, and on nothing that changes in between")


class _Recomputed(torch.autograd.Function):
    """Calls one after the other, each reading the tensors that the one before returned."""

    @staticmethod
    def forward(ctx, run: _Run, *tensors: Tensor):
        y, streams = run.forward(tensors[:len(tensors) - len(run.differentiable)])
        saved = [run.tensors[number] for number in run.saved]
        for number in run.saved:
            run.tensors[number] = None
        numbers: dict[int, int] = {}  # id -> among the saved; a stream that passes a coupling is saved once
        ctx.streams = {}
        for passed, each in streams.items():
            for stream in each:
                if id(stream) not in numbers:
                    numbers[id(stream)] = len(saved)
                    saved.append(stream)
            ctx.streams[passed] = [numbers[id(stream)] for stream in each]
        ctx.run = run
        ctx.save_for_backward(*saved)
        return y

    @staticmethod
    def backward(ctx, *grads: Tensor):
        run, saved = ctx.run, ctx.saved_tensors  # once: each reading unpacks all, which checkpointing allows once only
        tensors = run.take_back(saved[:len(run.saved)])
        streams = {passed: tuple(saved[number] for number in numbers) for passed, numbers in ctx.streams.items()}
        del saved
        differentiate = _differentiably if torch.is_grad_enabled() else _one_by_one
        grads, found = differentiate(run, tensors, streams, grads)
        return None, *grads, *(found.get(number) for number, tensor in enumerate(tensors) if tensor.requires_grad)


def _one_by_one(run: _Run, tensors: list[Tensor], streams: dict[int, Tensors], grads: Tensors
                ) -> tuple[Tensors, dict[int, Tensor]]:
    """Return the gradients of the first streams and of the inputs by number, with one call's graph at a time."""
    graphs, run.graphs = run.graphs, []  # they can be walked once only
    sums, run.sums = _Sums(tensors, run.shared) if run.sums is None else run.sums, None
    differences, x = {}, ()
    for i in reversed(range(len(run.calls))):
        call = run.calls[i]
        if graphs:
            x, y = graphs.pop()
        else:
            with sums.making():
                if i in streams:
                    x = _leaves(streams.pop(i))
                    y = call.graph(x, sums.leaves)
                else:
                    x, y = _rebuilt(call, streams.pop(i + 1, x), sums.leaves)
            if i in run.stored and (difference := call.difference(y)) is not None:
                differences[i] = difference
        wanted = [number for number in sorted(call.numbers) if sums.leaves[number].requires_grad]
        edges = [(get_gradient_edge(each), grad) for each, grad in zip(y, grads, strict=True) if each.requires_grad]
        y = ()  # while its graph is walked, nothing of it needs to be held
        grads = sums.walk(edges, x, wanted)
        x = tuple(stream.detach() for stream in x)
    run.check_alike(differences, x[0])
    return grads, sums if run.outer is None else run.outer.taking_over(sums)


def _differentiably(run: _Run, tensors: list[Tensor], streams: dict[int, Tensors], grads: Tensors
                    ) -> tuple[Tensors, dict[int, Tensor]]:
    """Return the same gradients with a graph of their own (`create_graph=True`), by plain autograd."""
    if 0 not in streams:
        raise RuntimeError("a chain that is inverted (store_every=None) has no second derivatives; use store_every=1")
    first, leaves = ([tensor.view_as(tensor) if tensor.requires_grad else tensor for tensor in each]
                     for each in (streams[0], tensors))  # views, so that what a stream descends from is left out
    y = tuple(first)
    for call in run.calls:
        y = call.graph(y, leaves)
    refuse_hidden([get_gradient_edge(each) for each in y if each.requires_grad], [*first, *leaves])
    outputs = [(each, grad) for each, grad in zip(y, grads, strict=True) if each.requires_grad]
    wanted = [tensor for tensor in (*first, *leaves) if tensor.requires_grad]
    outputs, of_outputs = zip(*outputs, strict=True)
    found = iter(torch.autograd.grad(outputs, wanted, of_outputs, allow_unused=True, create_graph=True))
    of_first, of_inputs = ([next(found) if tensor.requires_grad else None for tensor in each]
                           for each in (first, leaves))
    return tuple(of_first), dict(enumerate(of_inputs))


def _rebuilt(call: Call, y: Tensors, leaves: list[Tensor]) -> tuple[Tensors, Tensors]:
    """Return x, rebuilt from a coupling's results y, and y with a graph."""
    context = call.context_of(leaves)
    with call.again(leaves):
        if hasattr(call.module, "rebuild"):
            with torch.enable_grad():
                return call.module.rebuild(*y, *context)
        with torch.no_grad():
            x = _leaves(call.module.inverse(*y, *context))
    return x, call.graph(x, leaves)


class _Sums(dict[int, Tensor]):
    """Number of an input -> the sum of its gradients, while a chain's graphs are walked one after the other.

    What a graph has of chains within this one adds its gradients here, rather than hand all of them over at the end.

    Args:
        tensors: the inputs.
        shared: numbers of those that several calls read.
    """

    _thread = threading.local()

    def __init__(self, tensors: Sequence[Tensor], shared: set[int]):
        super().__init__()
        self.leaves = list(map(_stand_in, tensors))
        self._numbers = {id(leaf): number for number, leaf in enumerate(self.leaves) if leaf.requires_grad}
        self._shared = shared
        self._task: int | None = None  # of autograd's, that walks a graph

    @classmethod
    def being_made(cls) -> "_Sums | None":
        """Return the sums to which the graph belongs that this thread is making."""
        return getattr(cls._thread, "sums", None)

    @contextmanager
    def making(self) -> Iterator[None]:
        """Within, this thread makes a graph that will be walked for these sums."""
        before, _Sums._thread.sums = self.being_made(), self
        try:
            yield
        finally:
            _Sums._thread.sums = before

    def walk(self, edges: list[tuple[GradientEdge, Tensor]], x: Tensors, numbers: list[int]) -> Tensors:
        """Differentiate what `edges` are of, given their gradients; return those of x.

        Args:
            edges: with the gradients that come in.
            x: streams.
            numbers: of the inputs that may have a part in it.
        """
        read = [self.leaves[number] for number in numbers]
        refuse_hidden([edge for edge, _ in edges], [*x, *read])
        for edge, _ in edges:
            edge.node.register_prehook(self._begin)
        outputs, grads = zip(*edges, strict=True)
        found = torch.autograd.grad(outputs, [*x, *read], grads, allow_unused=True)
        self._task = None
        self._add(dict(zip(numbers, found[len(x):], strict=True)))
        return tuple(torch.zeros_like(stream) if grad is None else grad
                     for stream, grad in zip(x, found[:len(x)], strict=True))

    def taking_over(self, inner: "_Sums") -> "_Sums":
        """Take over what the sums of a chain within have in common with these, where it is walked as part of these.

        It is not where a module differentiates a chain itself.  Returns what is left of them.
        """
        if self._task is not None and self._task == torch._C._current_graph_task_id():
            for number in [number for number in inner if id(inner.leaves[number]) in self._numbers]:
                self._add({self._numbers[id(inner.leaves[number])]: inner.pop(number)})
        return inner

    def _begin(self, *_) -> None:
        self._task = torch._C._current_graph_task_id()

    def _add(self, grads: dict[int, Tensor | None]) -> None:
        for number, grad in grads.items():
            if grad is None:
                continue
            if number in self:
                self[number] += grad
            else:  # what is added to later must be nobody else's
                self[number] = grad.clone() if number in self._shared else grad


def _leaves(x: Tensors) -> Tensors:
    return tuple(stream.detach().requires_grad_() for stream in x)


def _stand_in(tensor: Tensor) -> Tensor:
    """Return what is differentiated in place of a tensor, to keep its own graph and its hooks out of it."""
    if not tensor.requires_grad:
        return tensor
    if not tensor.is_leaf:
        return tensor.detach().requires_grad_()
    with torch.enable_grad():
        return tensor.view_as(tensor) if tensor._backward_hooks else tensor
