"""Epoch after epoch: calls the step that train.py defines, saves states and checkpoints, tests, and hears signals."""
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from model.memory import leaner
from utils import distributed
from utils.devices import memory_suffices
from utils.evaluation.speed import compile_blocks
from utils.training.report import Epoch, test_and_log
from utils.training.run import Run
from utils.training.state import save_checkpoint

GIVE_UP_AFTER = 10  # iterations in a row that were skipped; a gradient scaler's start at 65536 is then down to 64

# One iteration: takes the run and the crops that follow, a batch (batch, 1, P, P) uint8 for each slot of this process;
# returns the loss and the norm of its gradient.
Step = Callable[[Run, Iterator[Tensor]], tuple[Tensor, Tensor]]


def train(run: Run, step: Step, unlogged: dict[str, Any] | None = None) -> bool:
    """Train until the last iteration; False where a signal stopped it before, which the last state then outlives.

    Args:
        run: what to train, and from where on.
        step: one iteration.
        unlogged: record of an epoch after which the run was killed before its tests were done.
    """
    with distributed.stop_on_signal() as stop:
        if test_and_log(run, unlogged, stop) and train_epochs(run, step, stop):
            return True
    run.report(f"stopped by a signal after iteration {run.progress.iteration}; the same command goes on from there")
    return False


def train_epochs(run: Run, step: Step, stop: threading.Event) -> bool:
    """Train until the last iteration; False where `stop`, which a signal sets, has ended it before."""
    settings, process, progress = run.settings, run.process, run.progress
    if progress.iteration >= settings.last_iteration:
        process.print(f"nothing is left to do; the weights are in {settings.folder}")
        return True
    if progress.iteration == 0:
        run.save()  # whatever happens from now on, there is a state
    torch.backends.cudnn.benchmark = True  # crops are of one size
    if settings.compile:
        compile_blocks(run.net, process.device, dynamic=False)  # crops are of one size
    loader = DataLoader(run.crops, batch_sampler=run.crop_numbers(), num_workers=settings.num_workers,
                        worker_init_fn=distributed.leave_process_group, pin_memory=process.device.type == "cuda",
                        generator=torch.Generator())  # its own, that a start draws nothing from everybody's
    batches = Batches(iter(loader))
    while progress.iteration < settings.last_iteration:
        epoch = Epoch(run)
        if not train_epoch(run, epoch, step, batches, stop):
            run.save()
            return False
        if not finish_epoch(run, epoch, batches, stop):
            return False
    process.print(f"done; the weights are in {settings.folder}")
    return True


class Batches:
    """An iterator that measures how long it is waited for.

    Attributes:
        waited: seconds, of all calls together.
    """

    def __init__(self, batches: Iterator[Tensor]):
        self.batches, self.waited = batches, 0.0

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> Tensor:
        start = time.monotonic()
        batch = next(self.batches)
        self.waited += time.monotonic() - start
        return batch


def train_epoch(run: Run, epoch: Epoch, step: Step, batches: Batches, stop: threading.Event) -> bool:
    """Train to the end of the epoch or of the run; False where it was stopped before."""
    settings, process, progress = run.settings, run.process, run.progress
    pulse, saved = distributed.Pulse(process, progress.iteration + 1), time.monotonic()
    with epoch.bar() as bar:
        while progress.iteration < epoch.end:
            with memory_suffices("for a training step: choose a smaller --batch_size or --patch_size, or "
                                 "--invertible both"):
                loss, norm = step_that_fits(run, step, batches)
            bar.update()
            epoch.point(loss, norm)
            save_due = process.is_main and time.monotonic() - saved > 60 * settings.save_minutes
            if not pulse.due(progress.iteration, stop.is_set() or save_due):
                continue
            stopped, save_due = pulse.confer(progress.iteration, [stop.is_set(), save_due])
            epoch.show(bar, loss)
            give_up_if_nothing_is_finite(run)
            if stopped:
                return progress.iteration == epoch.end
            if save_due and progress.iteration < epoch.end:  # at its end, the state will hold the epoch's record
                run.save()
                saved = time.monotonic()
    return True


def step_that_fits(run: Run, step: Step, batches: Iterator[Tensor]) -> tuple[Tensor, Tensor]:
    """One iteration; with --invertible auto and one process, again with less memory where it runs out before the
    weights are moved.  Several processes cannot: the others would wait for gradients."""
    settings = run.settings
    if settings.invertible != "auto" or "invertible" in settings.without or run.process.world_size > 1:
        return step(run, batches)
    kept = [next(batches) for _ in run.slots]
    while True:
        try:
            return step(run, iter(kept))
        except torch.OutOfMemoryError:
            if run.net.invertible == "both":
                raise
        run.optimizer.zero_grad()  # out here nothing of what failed is alive
        run.net.invertible = leaner(run.net.invertible)
        run.report(f"not enough memory after all: goes on with --invertible {run.net.invertible}")


def give_up_if_nothing_is_finite(run: Run) -> None:
    """End with an error; all processes see the same gradients, and so end together."""
    if (in_a_row := run.skipped_in_a_row) >= GIVE_UP_AFTER:
        sys.exit(1 if not run.process.is_main else
                 f"error: no finite loss or gradient in {in_a_row} iterations in a row, up to iteration "
                 f"{run.progress.iteration}; the last state is kept; try a smaller --learning_rate or "
                 "--precision fp32, with another --model_dir")


def finish_epoch(run: Run, epoch: Epoch, batches: Batches, stop: threading.Event) -> bool:
    """Save and test after an epoch, or after the part of one that `--max_iters` leaves; False where it was stopped."""
    settings, iteration = run.settings, run.progress.iteration
    run.read_totals()
    record = epoch.record(batches.waited)
    batches.waited = 0.0
    if iteration % settings.iters_per_epoch == 0:
        run.begin_epoch()
    # Where an epoch was taken up in its middle, --max_iters may have left a checkpoint of its first part.
    due = (epoch.number % settings.save_interval == 0 or iteration == settings.last_iteration
           or epoch.start % settings.iters_per_epoch)
    if run.process.is_main and due:
        (run.save_checkpoint or save_checkpoint)(run.best, settings.folder, epoch.number)
    run.save(unlogged=record)  # after the checkpoint: what a state counts as done is all there
    return test_and_log(run, record, stop)
