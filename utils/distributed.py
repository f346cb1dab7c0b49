"""The process group of `torch.distributed.run`, the seeds of its ranks, and the signals that end it.

A plain `python train.py` has no group.
"""
import os
import signal
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from utils.devices import open_device
from utils.errors import UserError, first_line

# Rank 0 tests and writes while the others wait for it, which must not count as a hung collective.
_PATIENCE = timedelta(hours=1)
SAY_AFTER = 10  # seconds of waiting for the others to start


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

    def all_gather(self, thing: Any) -> list[Any]:
        """`thing` of every rank, in order of rank, the same list on all."""
        if not dist.is_initialized():
            return [thing]
        things = [None] * self.world_size
        dist.all_gather_object(things, thing)
        return things

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """Let rank 0 run the body before the others: what it downloads, they find; where it fails, they go on too."""
        if dist.is_initialized() and not self.is_main:
            dist.barrier()
        try:
            yield
        finally:
            if dist.is_initialized() and self.is_main:
                dist.barrier()


def start(device: str | None = None) -> Process:
    """Join the group the environment describes (RANK, WORLD_SIZE, LOCAL_RANK), nccl on CUDA devices, gloo elsewhere.

    Args:
        device: "cpu", "cuda", "cuda:1", ...; None takes CUDA where there is any. Of a group, each process takes the
            CUDA device of its local rank.

    Raises:
        UserError: for a device that is not there, or an environment that does not describe a group.
    """
    grouped = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    with _environment_is_whole():
        rank = int(os.environ["RANK"]) if grouped else 0
        world_size = int(os.environ["WORLD_SIZE"]) if grouped else 1
        local_rank = int(os.environ.get("LOCAL_RANK", rank)) if grouped else None
    place = open_device(device, local_rank)
    if place.type == "cuda":
        place = torch.device("cuda", place.index or 0)
        torch.cuda.set_device(place)
    if grouped:
        on_cuda = place.type == "cuda"
        with _environment_is_whole(), _waiting_is_told(rank, world_size):
            store, *_ = next(dist.rendezvous("env://", timeout=_PATIENCE))
            store = meet(store, rank, world_size)
            dist.init_process_group("nccl" if on_cuda else "gloo", store=store, rank=rank, world_size=world_size,
                                    timeout=_PATIENCE, device_id=place if on_cuda else None)
    return Process(rank, world_size, place)


@contextmanager
def _environment_is_whole() -> Iterator[None]:
    """Turn a ValueError, which is about the environment, into a UserError that says so."""
    try:
        yield
    except ValueError as error:
        raise UserError(f"RANK and WORLD_SIZE are set, but what goes with them is not as torch.distributed.run sets it "
                        f"({first_line(error)}); start by that, or unset them") from error


@contextmanager
def _waiting_is_told(rank: int, world_size: int) -> Iterator[None]:
    """Say what is waited for where it takes long, as where RANK and WORLD_SIZE are left over from something else."""
    where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    told = threading.Timer(SAY_AFTER, print, [
        f"rank {rank} is still waiting for the others: RANK and WORLD_SIZE are set, so {world_size} processes must "
        f"start and meet at {where}; unset RANK and WORLD_SIZE to run one alone"], {"file": sys.stderr, "flush": True})
    told.daemon = True
    told.start()
    try:
        yield
    finally:
        told.cancel()


def meet(store: dist.Store, rank: int, world_size: int) -> dist.Store:
    """The part of `store` that belongs to these processes alone, the same on all ranks.

    `torch.distributed.run` (torch 2.11, 2.13) keeps one store through all restarts of its workers. Under the plain
    store, a process that is started anew now and then reads where one that died had listened, and waits there. The
    launcher's count of restarts does not tell the starts apart, since machines may count differently.

    Every process gives itself a name that never was; rank 0 goes on when it has the others' names, and they go on
    when they read their own in its list.
    """
    name = uuid.uuid4().hex
    if rank == 0:
        store.set("meeting", name)
        store.set(f"{name}/all", ",".join(store.get(f"{name}/{other}").decode() for other in range(1, world_size)))
        return dist.PrefixStore(name, store)
    while True:
        meeting = store.get("meeting").decode()  # may be that of processes that died
        store.set(f"{meeting}/{rank}", name)
        while store.get("meeting").decode() == meeting:
            if store.check([f"{meeting}/all"]) and name in store.get(f"{meeting}/all").decode():
                return dist.PrefixStore(meeting, store)
            time.sleep(0.02)


def stop() -> None:
    """Leave the group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def seed_of(*numbers: int) -> int:
    """One 63-bit seed from several whole numbers >= 0 (seed, iteration, rank, ...), well mixed."""
    entropy = (len(numbers), *numbers)  # with the length, since zeros at the end would make no difference
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> np.uint64(1))


class Pulse:
    """Tells all processes when to confer: at the same iterations, about once a second, for it makes them wait.

    Args:
        process: this one.
        first: the first iteration after which to confer.
    """

    def __init__(self, process: Process, first: int):
        self.process, self.next, self.gap, self.since = process, first, 1, time.monotonic()

    def due(self, iteration: int, urgent: bool) -> bool:
        """Whether to confer after this iteration; who is alone need not wait where it is urgent."""
        return iteration >= self.next or (urgent and self.process.world_size == 1)

    def confer(self, iteration: int, values: list[float]) -> list[float]:
        """Sum of each value over the processes; every rank must call it, whenever a conference is due."""
        now = time.monotonic()
        *sums, seconds = self.process.sum([*values, now - self.since])
        mean = seconds / self.process.world_size  # the same on all
        self.gap = max(1, min(2 * self.gap, int(self.gap / max(mean, 1e-3))))
        self.next, self.since = iteration + self.gap, now
        return sums


def leave_process_group(worker: int) -> None:
    """For a DataLoader's `worker_init_fn`: signals to the whole group, as from Ctrl-C and `torch.distributed.run`.

    They are meant for the process that trains, which still needs its workers when it saves.
    """
    if hasattr(os, "setsid"):  # Windows has no such groups
        os.setsid()


@contextmanager
def stop_on_signal() -> Iterator[threading.Event]:
    """An event that is set by signals that would end the process, or, as Slurm's SIGUSR1, warn it of its end.

    SIGHUP, of a terminal that is closed, stays ignored where `nohup` had it ignored.
    """
    asked = threading.Event()
    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name)]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # Windows has neither
        numbers.append(signal.SIGHUP)
    former = {number: signal.signal(number, lambda *_: asked.set()) for number in numbers}
    try:
        yield asked
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
