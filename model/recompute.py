"""Compute a module a second time, for backward, as it was computed the first time: what `reversible.py` stands on.

What a module computes may depend on its arguments, its parameters and buffers, train() or eval(), autocast and torch's
global random numbers.  A `Call` takes them down in forward and brings them back for the second time.  A module must not
act twice either: buffers that it updates (batch norm, spectral norm) are updated once.  All else is refused: a tensor
that was modified in place meanwhile, one that needs a gradient and is hidden from the caller, and whatever makes the
second result another than the first.
"""
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn.utils import parametrize
from torch.utils.checkpoint import get_device_states, set_device_states

Tensors = tuple[Tensor, ...]
Slot = tuple[dict[str, Tensor | None], str, int]  # where a module keeps a tensor: dictionary, name; and its number
# Modules -> modes and number of slots -> which slots are buffers that the module updates.
UPDATES: WeakKeyDictionary[nn.Module, dict[tuple, set[int]]] = WeakKeyDictionary()
SAMPLE = 4096  # numbers of a result that are compared with those of the first time


class Inputs:
    """The distinct tensors that calls read beside their first arguments, numbered in order of appearance."""

    def __init__(self):
        self.tensors: list[Tensor] = []
        self.of_modules: set[int] = set()  # numbers of those that a module keeps
        self._numbers: dict[int, int] = {}  # by the tensor's id
        self._slots: dict[int, tuple[list[Slot], list[nn.Module]]] = {}  # by the module's id

    def number(self, tensor: Tensor) -> int:
        number = self._numbers.setdefault(id(tensor), len(self.tensors))
        if number == len(self.tensors):
            self.tensors.append(tensor)
        return number

    def of(self, module: nn.Module) -> tuple[list[Slot], list[nn.Module]]:
        """Return where the module and those within it keep parameters and buffers, and all of these modules."""
        if id(module) not in self._slots:
            parts = list(module.modules())
            slots = [(held, name, self.number(tensor)) for part in parts for held in (part._parameters, part._buffers)
                     for name, tensor in held.items() if tensor is not None]
            self.of_modules.update(number for _, _, number in slots)
            self._slots[id(module)] = slots, parts
        return self._slots[id(module)]


@dataclass
class Number:
    """Stands for a tensor in a context, by its number among the inputs."""

    value: int


@dataclass
class Call:
    """One module and its context, the tensors it reads, and the state in which it was computed first."""

    module: nn.Module
    context: tuple  # `Number` in place of a tensor
    slots: list[Slot]
    numbers: set[int]  # of the tensors that it reads
    training: list[tuple[nn.Module, bool]]  # whether each of its modules was in train()
    autocast: tuple[str, torch.dtype, bool]
    turn: object  # within which the call was made (see `_Turns`)
    random: tuple[list[int], list[Tensor]] | None = None  # generators before the first time, where it drew numbers
    updated: dict[int, Tensor] = field(default_factory=dict)  # buffers' numbers -> copies from before the first time
    samples: list[Tensor | None] = field(default_factory=list)  # of the first results

    @classmethod
    def of(cls, module: nn.Module, context: tuple, inputs: Inputs, device: str) -> "Call":
        """Take down what the call reads.

        Raises:
            TypeError: for a list, dictionary or set in the context, and where `parametrize.cached` is in use.
        """
        slots, parts, numbers = [], [], set()

        def numbered(item: Any) -> Any:
            if isinstance(item, tuple):
                return tuple(map(numbered, item))
            if isinstance(item, Mapping | list | set):
                raise TypeError(f"a context holds tensors, modules, constants and tuples, not a {type(item).__name__}")
            if isinstance(item, Tensor):
                numbers.add(number := inputs.number(item))
                return Number(number)
            if isinstance(item, nn.Module):
                for mine, more in zip((slots, parts), inputs.of(item), strict=True):
                    mine.extend(more)
            return item

        numbered(module)
        context = numbered(tuple(context))
        _refuse_cached(parts)
        return cls(module, context, slots, numbers | {number for _, _, number in slots},
                   [(part, part.training) for part in parts],
                   (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)), TURNS.mine)

    def first(self, x: Tensors, tensors: Sequence[Tensor], graph: bool = False) -> Tensors:
        """Compute for the first time, and take down in which state.

        Args:
            x: the first arguments.
            tensors: the inputs, or stand-ins for them where a graph is made.
            graph: whether one is.

        Raises:
            RuntimeError: where a buffer is updated that was not when the module was first seen.
        """
        if isinstance(x[0], FakeTensor):  # without numbers there is no state
            return self.graph(x, tensors) if graph else self._result(x, tensors)
        buffers = {i: tensors[number] for i, (_, _, number) in enumerate(self.slots)
                   if not tensors[number].requires_grad}
        known = UPDATES.setdefault(self.module, {})
        modes = len(self.slots), *(training for _, training in self.training)
        copies = {i: buffers[i].clone() for i in known.get(modes, buffers)}
        versions = {i: version_of(buffer) for i, buffer in buffers.items()}
        random = _random_states(x[0])
        y = self.graph(x, tensors) if graph else self._result(x, tensors)
        if not all(map(torch.equal, random[1], _random_states(x[0])[1])):
            self.random = random
        updated = {i for i, version in versions.items() if version_of(buffers[i]) != version}
        if modes not in known:  # kernels may update without a new version
            known[modes] = updated | {i for i, copy in copies.items() if not torch.equal(copy, buffers[i])}
        if more := updated - known[modes]:
            raise RuntimeError(f"{type(self.module).__name__} has begun to update a buffer of shape "
                               f"{tuple(buffers[more.pop()].shape)} in forward")
        self.updated = {self.slots[i][2]: copies[i] for i in known[modes]}
        self.samples = [None if any(new is old for old in x) else _sample(new) for new in y]
        return y

    def graph(self, x: Tensors, leaves: Sequence[Tensor]) -> Tensors:
        """Compute with a graph, in the state of the first time, with `leaves` in place of the inputs."""
        with self.again(leaves), torch.enable_grad():
            return self._result(x, leaves)

    @contextmanager
    def again(self, leaves: Sequence[Tensor]) -> Iterator[None]:
        """Within, the module is in the state of the first time, with `leaves` in place of the inputs."""
        _refuse_cached(part for part, _ in self.training)
        wanted = dict(enumerate(leaves)) | {number: copy.clone() for number, copy in self.updated.items()}
        own = [(held, name, held.get(name)) for held, name, _ in self.slots]
        modes = [(part, part.training) for part, training in self.training if part.training is not training]
        changes = modes or self.random or any(held.get(name) is not wanted[number] for held, name, number in self.slots)
        device, dtype, enabled = self.autocast
        with ExitStack() as stack:
            stack.enter_context(TURNS.take(self.turn) if changes else TURNS.join(TURNS.mine or self.turn))
            stack.enter_context(torch.autocast(device, dtype, enabled, cache_enabled=False))  # weights are cast once
            if self.random:
                stack.enter_context(_random_numbers_from(*self.random, device))
            try:
                for part, training in self.training if modes else ():
                    part.training = training
                for held, name, number in self.slots:
                    if held.get(name) is not wanted[number]:
                        held[name] = wanted[number]
                yield
            finally:
                for held, name, tensor in own:
                    if held.get(name) is not tensor:
                        held[name] = tensor
                for part, training in modes:
                    part.training = training

    def context_of(self, tensors: Sequence[Tensor]) -> tuple:
        def filled(item: Any) -> Any:
            if isinstance(item, tuple):
                return tuple(map(filled, item))
            return tensors[item.value] if isinstance(item, Number) else item

        return filled(self.context)

    def difference(self, y: Tensors) -> Tensor | None:
        """Return how far the results are from the first ones, relative: (), or None where nothing is known."""
        pairs = [(_sample(new).float(), old.float()) for new, old in zip(y, self.samples, strict=False)
                 if old is not None]
        if not pairs:
            return None
        new, old = (torch.cat(each) for each in zip(*pairs, strict=True))
        return (new - old).norm() / old.norm().clamp_min(1e-30)

    def precision(self, x: Tensor) -> float:
        """Return the distance from 1 to the next number, of the type it is computed in."""
        _, dtype, enabled = self.autocast
        return torch.finfo(dtype if enabled else x.dtype).eps

    def _result(self, x: Tensors, tensors: Sequence[Tensor]) -> Tensors:
        y = self.module(*x, *self.context_of(tensors))
        return (y,) if isinstance(y, Tensor) else tuple(y)


def refuse_hidden(outputs: Iterable[GradientEdge], known: Iterable[Tensor]) -> None:
    """Raise TypeError where a graph leads to a tensor that needs a gradient and is not among the known ones."""
    seen = {get_gradient_edge(tensor).node for tensor in known if tensor.requires_grad}
    nodes = [output.node for output in outputs]
    while nodes:
        if (node := nodes.pop()) in seen:
            continue
        seen.add(node)
        if node.name() == "torch::autograd::AccumulateGrad":
            raise TypeError(f"a tensor of shape {tuple(node.variable.shape)} needs a gradient, which would be lost, as "
                            "it is neither an argument, nor in the context, nor a parameter or buffer of a module; "
                            "register it, or detach it")
        nodes.extend(next_node for next_node, _ in node.next_functions if next_node is not None)


def version_of(tensor: Tensor) -> int:
    """Return a number that changes when the tensor is modified in place."""
    return 0 if tensor.is_inference() else tensor._version


def _refuse_cached(parts: Iterable[nn.Module]) -> None:
    """Raise TypeError where what a parametrization computes is kept: its gradient would be lost."""
    if parametrize._cache_enabled and any(map(parametrize.is_parametrized, parts)):
        raise TypeError("a parametrized module cannot be computed again within torch.nn.utils.parametrize.cached(): "
                        "leave it out, or compute with plain autograd")


def _sample(tensor: Tensor) -> Tensor:
    """Return some of its numbers, which keep nothing else in memory."""
    flat = tensor.detach().reshape(-1)
    return flat[::(flat.numel() // SAMPLE) | 1].clone()  # an odd stride, to meet all channels and places


def _random_states(x: Tensor) -> tuple[list[int], list[Tensor]]:
    """Return x's device, where it has generators of its own, and the states of the CPU's and of its generator."""
    devices, states = get_device_states(x)
    return devices, [torch.get_rng_state(), *states]


@contextmanager
def _random_numbers_from(devices: list[int], states: list[Tensor], device_type: str) -> Iterator[None]:
    """Within, random numbers are drawn from these states; afterwards from where they were."""
    with torch.random.fork_rng(devices, device_type=device_type):
        torch.set_rng_state(states[0])
        set_device_states(devices, states[1:], device_type=device_type)
        yield


class _Turns:
    """Who may change modules for a while: one thread at a time, and any thread for what is computed within its turn.

    The latter since autograd has threads of its own: what a module in a turn differentiates may be computed in one.
    """

    def __init__(self):
        self._changed = threading.Condition()
        self._taken: list[object] = []  # turns within turns
        self._of_thread = threading.local()

    @property
    def mine(self) -> object | None:
        return getattr(self._of_thread, "turn", None)

    @contextmanager
    def join(self, turn: object | None) -> Iterator[None]:
        """Within, what this thread computes belongs to the turn."""
        before, self._of_thread.turn = self.mine, turn
        try:
            yield
        finally:
            self._of_thread.turn = before

    @contextmanager
    def take(self, within: object | None) -> Iterator[None]:
        """Wait for a turn, where none is taken but one that this thread is in or `within`."""
        turn, allowed = object(), (within, self.mine)
        with self._changed:
            self._changed.wait_for(lambda: not self._taken or self._taken[-1] in allowed)
            self._taken.append(turn)
        try:
            with self.join(turn):
                yield
        finally:
            with self._changed:
                self._taken.remove(turn)
                self._changed.notify_all()


TURNS = _Turns()
