"""A training run: what it consists of, where it is, and how it is saved and taken up again."""
import argparse
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from utils.data.crops import TrainingCrops
from utils.data.testsets import Picture, load_testset
from utils.distributed import Process
from utils.errors import UserError
from utils.training import state as state_files
from utils.training.log import TrainingLog
from utils.training.settings import configuration
from utils.training.state import Progress


@dataclass
class Run:
    """What a training run consists of."""

    args: argparse.Namespace
    process: Process
    crops: TrainingCrops
    net: nn.Module  # an IDM
    ema: nn.Module | None  # another, which holds the average of the weights so far
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    progress: Progress = field(default_factory=Progress)
    testset: list[Picture] = field(default_factory=list)  # empty: no tests
    log: TrainingLog | None = None  # on rank 0
    unlogged: dict[str, Any] | None = None  # record of the epoch just finished, until its tests are done
    lock: AbstractContextManager | None = None  # on rank 0, of the folder, as long as it lives

    def __post_init__(self):
        progress = self.progress
        # What an iteration adds stays on the device, so that no iteration waits for it: loss, iterations with a finite
        # one, those without, and how many of these in a row.
        self.totals = torch.tensor([progress.loss_sum, progress.loss_count, progress.skipped,
                                    progress.skipped_in_a_row], dtype=torch.float64, device=self.process.device)

    @property
    def folder(self) -> Path:
        return self.args.model_dir / self.args.run_name

    @property
    def best(self) -> nn.Module:
        """The network to test and to keep."""
        return self.ema or self.net

    @property
    def last_iteration(self) -> int:
        return min(self.args.epoch * self.args.iters_per_epoch, self.args.max_iters or sys.maxsize)

    @property
    def batches(self) -> int:
        """That make an iteration, of all processes together."""
        return self.process.world_size * self.args.accumulate

    @property
    def slots(self) -> range:
        """The numbers of this process's batches among those of an iteration.

        All that is drawn depends on the slot and the iteration alone: two processes train as one does that accumulates
        two batches, and a resumed run repeats what an uninterrupted one would have done.
        """
        first = self.process.rank * self.args.accumulate
        return range(first, first + self.args.accumulate)

    def crop_numbers(self) -> Iterator[range]:
        """Of every batch that this process is still to see, one by one; no two batches of any process share one."""
        first, size, left = self.progress.crops, self.args.batch_size, self.last_iteration - self.progress.iteration
        starts = (first + (i * self.batches + slot) * size for i in range(left) for slot in self.slots)
        return (range(start, start + size) for start in starts)

    def report(self, line: str) -> None:
        """Print and log one line, on rank 0."""
        if self.log:
            self.log.line(line)

    def read_totals(self) -> None:
        """Bring `progress` up to date, with means over all processes; every rank must call it."""
        totals = [total / self.process.world_size for total in self.process.sum(list(self.totals))]
        self.progress.loss_sum = totals[0]
        self.progress.loss_count, self.progress.skipped, self.progress.skipped_in_a_row = map(round, totals[1:])

    def save(self) -> None:
        """Write all from which the run can go on; every rank must call it."""
        self.read_totals()
        random = self.process.gather(state_files.random_states())
        if self.process.is_main:
            state_files.save_state(self.folder, {
                "configuration": configuration(self.args, self.crops.fingerprint()),
                "processes": self.process.world_size,
                "network": {name: value for name, value in self.net.config.items() if not name.startswith("_")},
                "model": self.net.state_dict(),
                "ema": self.ema.state_dict() if self.ema else None,
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(),
                "progress": asdict(self.progress),
                "random": random,
                "unlogged": self.unlogged,
            })

    def restore(self, state: dict) -> list[str]:
        """Take up a state, all but its progress; returns what there is to say about it.

        Raises:
            UserError: where the state is of a run with other settings.
        """
        saved, now = dict(state["configuration"]), configuration(self.args, self.crops.fingerprint())
        before = state["processes"]
        if before * saved["accumulate"] == self.batches:  # shared out in another way, but the same iteration
            saved["accumulate"] = now["accumulate"]
        state_files.check_configuration(saved, now, self.folder)
        self.net.load_state_dict(state["model"])
        if self.ema:
            self.ema.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.unlogged = state.get("unlogged")
        if self.process.rank < len(state["random"]):
            state_files.restore_random_states(state["random"][self.process.rank])
        if before == self.process.world_size:
            return []
        was = before * state["configuration"]["accumulate"] * self.args.batch_size
        return [f"{before} process(es) wrote the state, {self.process.world_size} go on; an iteration was {was} crops, "
                f"and is {self.batches * self.args.batch_size}"]


def check_agreement(process: Process, settings: dict[str, str]) -> None:
    """Raise UserError, naming the differences, unless all processes have these settings; every rank must call it."""
    of_all = process.all_gather(settings)
    different = [f"--{name} {' and '.join(dict.fromkeys(each[name] for each in of_all))}"
                 for name, value in settings.items() if any(each[name] != value for each in of_all)]
    if different:
        raise UserError(f"the processes were given different settings: {', '.join(different)}; give all the same")


def find_state(args: argparse.Namespace, process: Process) -> tuple[dict | None, list[str]]:
    """The state in the run's folder, None where the run is new; and what there is to say about it.

    Raises:
        UserError: where the folder holds a run that cannot go on, or the processes find different states.
    """
    folder = args.model_dir / args.run_name
    if not args.resume and any(int(path.stem.partition("_")[2]) for path in state_files.list_states(folder)):
        raise UserError(f"{folder} holds an earlier run; leave out --no-resume to go on with it, or train into another "
                        "--model_dir")
    state, notes = state_files.load_newest_state(folder)
    done = process.all_gather(state["progress"]["iteration"] if state else -1)
    if len(set(done)) > 1:
        raise UserError("the processes find different states to go on from; --model_dir must be one folder that all "
                        "machines share")
    if state and state["progress"]["iteration"] == 0:
        state = None  # not begun: a start makes the same network again, or another if the settings are others
    elif state is None and state_files.holds_checkpoint(folder):
        raise UserError(f"{folder} holds weights but no state to go on from; train into another --model_dir")
    return state, notes


def open_testset(args: argparse.Namespace, process: Process) -> tuple[list[Picture], list[str]]:
    """The pictures to test on, none where a machine has no such set; and what there is to say about it."""
    try:
        pictures, problem = load_testset(args.testset_name, args.data_dir), "another machine has not the pictures"
    except UserError as error:
        pictures, problem = [], error
    if all(process.all_gather(len(pictures))):
        return pictures, []
    return [], [f"no test after each epoch, since {problem}"]
