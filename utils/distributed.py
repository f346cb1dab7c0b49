"""The process group of `torch.distributed.run`, the seeds of its ranks, and the signals that end it.

A plain `python train.py` has no group.
"""
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from utils.errors import UserError

# Rank 0 tests and writes while the others wait for it, which must not count as a hung collective.
_PATIENCE = timedelta(hours=1)


@dataclass(frozen=True)
class Process:
    """Who this process is among those that train together."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this is the process that prints, tests and writes."""
        return self.rank == 0

    def print(self, *text: Any) -> None:
        """Print on rank 0 alone, at once."""
        if self.is_main:
            print(*text, flush=True)

    def wrap(self, net: nn.Module) -> nn.Module:
        """`net` under plain DistributedDataParallel where there is a group, else itself."""
        if not dist.is_initialized():
            return net
        device_ids = [self.device.index] if self.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(net, device_ids=device_ids)

    def sum(self, values: list[torch.Tensor | float]) -> list[float]:
        """Sum of each value over the ranks, the same numbers on all; waits for the device once."""
        numbers = torch.stack([torch.as_tensor(value, dtype=torch.float64, device=self.device) for value in values])
        if dist.is_initialized():
            dist.all_reduce(numbers)
        return numbers.tolist()

    def gather(self, thing: Any) -> list[Any]:
        """`thing` of every rank, in order of rank, on rank 0; an empty list on the others."""
        if not dist.is_initialized():
            return [thing]
        things = [None] * self.world_size if self.is_main else None
        dist.gather_object(thing, things)
        return things or []

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """Let rank 0 run the body before the others: what it downloads, they find."""
        if dist.is_initialized() and not self.is_main:
            dist.barrier()
        yield
        if dist.is_initialized() and self.is_main:
            dist.barrier()


def start(device: str | None = None) -> Process:
    """Join the group the environment describes (RANK, WORLD_SIZE, LOCAL_RANK), nccl on CUDA devices, gloo elsewhere.

    Args:
        device: "cpu", "cuda", "cuda:1", ...; None takes CUDA where there is any. Of a group, each process takes the
            CUDA device of its local rank.

    Raises:
        UserError: for a device that is not there.
    """
    grouped = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    rank = int(os.environ["RANK"]) if grouped else 0
    world_size = int(os.environ["WORLD_SIZE"]) if grouped else 1
    place = _device(device, int(os.environ.get("LOCAL_RANK", rank)) if grouped else None)
    if grouped:
        on_cuda = place.type == "cuda"
        dist.init_process_group("nccl" if on_cuda else "gloo", timeout=_PATIENCE, device_id=place if on_cuda else None)
    return Process(rank, world_size, place)


def stop() -> None:
    """Leave the group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def seed_of(*numbers: int) -> int:
    """One 63-bit seed from several whole numbers >= 0 (seed, rank, iteration, ...), well mixed."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


@contextmanager
def stop_on_signal() -> Iterator[threading.Event]:
    """An event that SIGTERM and SIGINT set, instead of ending the process."""
    asked = threading.Event()
    former = {number: signal.signal(number, lambda *_: asked.set()) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield asked
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def _device(name: str | None, local_rank: int | None) -> torch.device:
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise UserError(f"--device {name} is no device PyTorch knows; use cpu, cuda or cuda:0") from error
    if device.type != "cuda":
        return device
    count = torch.cuda.device_count()
    index = (device.index or 0) if local_rank is None else local_rank
    if index >= count:
        raise UserError(f"CUDA device {index} was asked for, and this machine has {count}; "
                        "use --device cpu or start fewer processes")
    torch.cuda.set_device(index)
    return torch.device("cuda", index)
