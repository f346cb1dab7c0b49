"""How much memory a training step holds, counted without computing it, and the fastest way that fits a device."""
import math
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from . import checkpoint
from .operators import LinearOperator

if TYPE_CHECKING:
    from .idm import IDM

FASTEST_FIRST = ("none", "sampling", "unet", "both")  # a step at full width: 1, 1.7, 2.1, 2.4 times as long
MARGIN = 1.25  # of what is counted: kernels take memory of their own, and allocators round up


@dataclass(frozen=True)
class Choice:
    """A value of `IDM.invertible`, and what it was chosen by; in bytes."""

    levels: str
    held: int  # by a training step at its peak, beside the weights
    free: int | None  # of the device; None: nobody can say, so that the leanest was chosen

    def __str__(self) -> str:
        free = "an unknown amount" if self.free is None else f"{self.free / 1e9:.3g} GB"
        return f"{self.levels}: a step is expected to hold {self.held / 1e9:.3g} GB, of {free} that is free"


def choose(
    net: "IDM",
    shape: tuple[int, int, int, int],  # of the images: (batch, channels, H, W)
    device: torch.device,
    half: torch.dtype | None = None,  # of autocast, where it is used
    free: int | None = None,  # bytes; None: those of the device
) -> Choice:
    """Return the fastest setting whose training step fits the free memory, else the leanest.

    A step is taken to need, beside what is counted, gradients and Adam's averages where there are no gradients yet.
    """
    free = free_bytes(device) if free is None else free
    beside = sum(3 * parameter.nbytes for parameter in net.parameters()
                 if parameter.requires_grad and parameter.grad is None)
    for levels in FASTEST_FIRST if free is not None else FASTEST_FIRST[-1:]:
        held = beside + step_bytes(net, shape, levels, device, half)
        if free is None or MARGIN * held <= free:
            break
    return Choice(levels, held, free)


def leaner(levels: str) -> str:
    """Return the next in the order of `FASTEST_FIRST`, where the last is the leanest of all; of that itself.

    One between may hold more than the one before: "unet" grows with T and the batch, "sampling" with the image.
    """
    return FASTEST_FIRST[min(FASTEST_FIRST.index(levels) + 1, len(FASTEST_FIRST) - 1)]


def step_bytes(net: "IDM", shape: tuple[int, int, int, int], levels: str, device: torch.device | str = "cpu",
               half: torch.dtype | None = None) -> int:
    """Count the bytes that a training step holds at its peak beside weights, gradients and what the operator keeps.

    The step runs on tensors that have shapes and no data, in seconds; what operations use inside them is not seen.
    Where images are differentiated a few at a time, two and three such parts are counted, and each more is taken to add
    what the third does.
    """
    batch, at_once = shape[0], net.images_at_once(*shape[2:])
    if levels == "none" or batch <= 3 * at_once:
        return _peak(net, shape, levels, torch.device(device), half)
    two, three = (_peak(net, (count * at_once, *shape[1:]), levels, torch.device(device), half) for count in (2, 3))
    return three + (three - two) * math.ceil(batch / at_once - 3)


def _peak(net: "IDM", shape: tuple[int, int, int, int], levels: str, device: torch.device, half: torch.dtype | None
          ) -> int:
    with FakeTensorMode(allow_non_fake_inputs=True), device, torch.enable_grad():
        twin = checkpoint.build(type(net), net.config, "the network")
        for module in twin.modules():  # tensors without data do not take part in Module.to
            for name, parameter in module.named_parameters(recurse=False):
                setattr(module, name, nn.Parameter(parameter.to(net.dtype)))
        twin.invertible, twin.store_every = levels, net.store_every
        x = torch.empty(shape, dtype=net.dtype)
        operator = _Everything()
        with FollowTensors([*twin.parameters(), *twin.buffers(), x]) as follow:
            with torch.autocast(device.type, half, enabled=half is not None):
                x_hat = twin(operator.A(x), operator)
            (x_hat - x).abs().mean().backward()
        gradients = [parameter.grad for parameter in twin.parameters() if parameter.grad is not None]
        return follow.peak(without=gradients)


def free_bytes(device: torch.device) -> int | None:
    """What can still be allocated on a device, of this process's own cache too; None: the system does not say."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    if device.type == "cpu":
        try:
            with open("/proc/meminfo", encoding="ascii") as file:
                return next(1024 * int(line.split()[1]) for line in file if line.startswith("MemAvailable:"))
        except (OSError, StopIteration):
            return None
    return None


class _Everything(LinearOperator):
    """Measures an image by itself: stands for an operator, of which a step holds images."""

    same_for_all = tight = True

    def A(self, x: Tensor) -> Tensor:
        return x * 1

    def A_adjoint(self, y: Tensor) -> Tensor:
        return y * 1


class FollowTensors(TorchDispatchMode):
    """Notes when the storage of each new tensor comes and goes."""

    def __init__(self, known: list[torch.Tensor]):
        super().__init__()
        self.known = {tensor.untyped_storage()._cdata for tensor in known}
        self.living: dict[int, weakref.ref] = {}
        self.number: dict[int, int] = {}  # of a living storage
        self.events: list[tuple[int, int]] = []  # (number of the storage, bytes it adds)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._note(tensor.untyped_storage())
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        key, size, number = storage._cdata, storage.nbytes(), len(self.events)
        if key in self.living or key in self.known:
            return

        def gone(_: weakref.ref) -> None:
            self.events.append((number, -size))
            del self.living[key], self.number[key]

        self.living[key], self.number[key] = weakref.ref(storage, gone), number
        self.events.append((number, size))

    def peak(self, without: list[torch.Tensor]) -> int:
        """The most bytes that lived at once, but for the storages of some tensors that are living now."""
        left_out = {self.number.get(tensor.untyped_storage()._cdata) for tensor in without}
        now = most = 0
        for number, size in self.events:
            now += 0 if number in left_out else size
            most = max(most, now)
        return most
