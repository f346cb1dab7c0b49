"""A training run: what it consists of, and how it is saved."""
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from utils.data.crops import TrainingCrops
from utils.data.testsets import Picture
from utils.distributed import Process
from utils.training.draws import Draw, Draws
from utils.training.log import TrainingLog
from utils.training.settings import Settings
from utils.training.state import Progress, TrainingState, random_states, save_state


@dataclass
class Run:
    """What a training run consists of, and how far it is."""

    settings: Settings
    process: Process
    crops: TrainingCrops
    net: nn.Module  # an IDM
    ema: nn.Module | None  # another, which holds the average of the weights so far
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    progress: Progress = field(default_factory=Progress)
    testset: list[Picture] = field(default_factory=list)  # empty: no tests
    log: TrainingLog | None = None  # on rank 0
    lock: AbstractContextManager | None = None  # on rank 0, of the folder, as long as it lives
    save_checkpoint: Callable[[nn.Module, Path, int], None] | None = None  # how, where not as IDM is saved

    def __post_init__(self):
        self.model = self.process.wrap(self.net.train())  # what a step calls: `net`, or it with gradients exchanged
        progress = self.progress
        # What an iteration adds stays on the device, so that no iteration waits for it: loss, iterations with a finite
        # one, those without, and how many of these in a row.
        self._totals = torch.tensor([progress.loss_sum, progress.loss_count, progress.skipped,
                                     progress.skipped_in_a_row], dtype=torch.float64, device=self.process.device)

    @property
    def best(self) -> nn.Module:
        """The network to test and to keep."""
        return self.ema or self.net

    @property
    def iterations_of_weights(self) -> int:
        """That the weights have seen, those of the run that this one decays from among them."""
        return self.progress.before + self.progress.iteration

    @property
    def batches(self) -> int:
        """That make an iteration, of all processes together."""
        return self.process.world_size * self.settings.accumulate

    @property
    def slots(self) -> range:
        """The numbers of this process's batches among those of an iteration.

        All that is drawn depends on the slot and the iteration alone: two processes train as one does that accumulates
        two batches, and a resumed run repeats what an uninterrupted one would have done.
        """
        first = self.process.rank * self.settings.accumulate
        return range(first, first + self.settings.accumulate)

    def crop_numbers(self) -> Iterator[range]:
        """Of every batch that this process is still to see, one by one; no two batches of any process share one."""
        first, size = self.progress.crops, self.settings.batch_size
        left = self.settings.last_iteration - self.progress.iteration
        starts = (first + (i * self.batches + slot) * size for i in range(left) for slot in self.slots)
        return (range(start, start + size) for start in starts)

    @cached_property
    def _draws(self) -> Draws:
        return Draws(self.settings, self.slots, self.process.device)

    def draw(self, slot: int) -> Draw:
        """Draw what this iteration's batch of the slot is trained with."""
        return self._draws.draw(self.iterations_of_weights, slot)

    def exchanging(self, slot: int) -> AbstractContextManager:
        """Around the call of `model` for a slot: processes exchange gradients once, with their last batches."""
        exchanged = slot == self.slots[-1] or self.model is self.net
        return nullcontext() if exchanged else self.model.no_sync()

    def count(self, loss: Tensor, finite: Tensor) -> None:
        """Add an iteration of all processes, which has moved the weights where its gradients were finite."""
        loss_sum, count, skipped, in_a_row = self._totals
        self._totals = torch.stack([loss_sum + loss.where(finite, 0), count + finite, skipped + ~finite,
                                    (in_a_row + 1) * ~finite])
        self.progress.iteration += 1
        self.progress.crops += self.batches * self.settings.batch_size

    @property
    def skipped_in_a_row(self) -> int:
        """Iterations up to this one that moved nothing; waits for the device."""
        return int(self._totals[3])

    def begin_epoch(self) -> None:
        """Count losses from 0 on."""
        self._totals[:2] = 0

    def read_totals(self) -> None:
        """Bring `progress` up to date, with means over all processes; every rank must call it."""
        totals = [total / self.process.world_size for total in self.process.sum(list(self._totals))]
        self.progress.loss_sum = totals[0]
        self.progress.loss_count, self.progress.skipped, self.progress.skipped_in_a_row = map(round, totals[1:])

    def report(self, line: str) -> None:
        """Print and log one line, on rank 0."""
        if self.log:
            self.log.line(line)

    def save(
        self,
        unlogged: dict[str, Any] | None = None,  # record of the epoch just finished, before its tests are done
    ) -> None:
        """Write all from which the run can go on; every rank must call it."""
        self.read_totals()
        random = self.process.gather(random_states())
        if self.process.is_main:
            save_state(self.settings.folder, TrainingState(
                configuration=configuration(self.settings, self.crops),
                processes=self.process.world_size,
                network={name: value for name, value in self.net.config.items() if not name.startswith("_")},
                model=self.net.state_dict(),
                ema=self.ema.state_dict() if self.ema else None,
                optimizer=self.optimizer.state_dict(),
                scaler=self.scaler.state_dict(),
                progress=self.progress,
                random=random,
                unlogged=unlogged,
            ))


def configuration(settings: Settings, crops: TrainingCrops) -> dict[str, Any]:
    """Return all that decides what the weights will be."""
    return {**settings.deciding(), "pictures": crops.fingerprint()}
