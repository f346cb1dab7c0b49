"""Train an unconditional DDPM: one process by `python -m baselines.train`, several by `torch.distributed.run -m`."""
import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from torch import Tensor

from baselines.ddpm import NORM_GROUPS, noise_loss, schedule, small_unet
from utils import distributed, errors
from utils.devices import computing_in
from utils.files import write_folder_atomic
from utils.flags import integer
from utils.training.draws import Draw
from utils.training.loop import train
from utils.training.run import Run
from utils.training.settings import NO_TESTS, Settings, flag, other_default, parse_settings
from utils.training.start import open_run
from utils.training.state import seed_all
from utils.training.update import update


def widths(text: str) -> tuple[int, ...]:
    """The type of --widths: 16,32,64,128."""
    values = tuple(integer(1)(part.strip()) for part in text.split(","))
    if any(value % NORM_GROUPS for value in values):
        raise argparse.ArgumentTypeError(f"must be multiples of {NORM_GROUPS}, as 16,32,64,128, not {text}")
    return values


@dataclass(frozen=True)
class DdpmSettings(Settings):
    """What the training of a DDPM is told: the settings of train.py that have a meaning here, and the widths."""

    without: ClassVar[frozenset[str]] = frozenset({
        "step_number", "cs_ratio", "block_size", "loss", "base_model", "width", "shuffle", "invertible", "compile",
        "testset_name", "operator", "operator_settings", "noise", "random_steps", "coupling", "schedule",
        "schedule_settings", "attention", "attention_window"})

    epoch: int = other_default("epoch", 4)
    learning_rate: float = other_default("learning_rate", 1e-3)
    lr_schedule: str = other_default("lr_schedule", "cosine")
    batch_size: int = other_default("batch_size", 16)
    patch_size: int = other_default("patch_size", 64)
    clip: float | None = other_default("clip", 1.0)
    ema: float | None = other_default("ema", 0.999)
    testset_name: str = other_default("testset_name", NO_TESTS)
    widths: tuple[int, ...] = flag((16, 32, 64, 128), "channels of the scales, each half as large as the one before",
                                   type=widths)

    @property
    def name(self) -> str:
        return f"ddpm_{'_'.join(map(str, self.widths))}"

    def described(self, net: UNet2DModel, before: int) -> list[tuple[str, str]]:
        source = f", from {self.decay_from} after {before} iterations" if self.decay_from else ""
        return [("network", f"{sum(parameter.numel() for parameter in net.parameters()):,} parameters, widths "
                            f"{', '.join(map(str, self.widths))}{source}")]


def train_step(
    scheduler: DDPMScheduler,
    run: Run,
    batches: Iterator[Tensor],  # crops (batch, 1, P, P) uint8, one after the other
) -> tuple[Tensor, Tensor]:
    """One iteration: add noise to crops, estimate it, and move the weights against the gradient of the square error.

    Returns the loss, a mean over this process's batches, and the norm of its gradient.
    """
    settings, device, losses = run.settings, run.process.device, []
    for slot in run.slots:  # batches whose gradients are added up
        pixels = next(batches).to(device, non_blocking=True)
        generator = torch.Generator().manual_seed(distributed.seed_of(settings.seed, run.iterations_of_weights, slot))
        x = Draw(symmetry=int(torch.randint(8, (), generator=generator))).turned(pixels)
        with computing_in(settings.precision, device), run.exchanging(slot):
            loss = noise_loss(run.model, scheduler, x, generator)
        finite = 1 + 0 * loss.detach()  # 1, or nan: a loss that is not finite shows in the gradients of all processes
        run.scaler.scale(finite * loss / settings.accumulate).backward()
        losses.append(loss.detach())
    loss = torch.stack(losses).mean()
    return loss, update(run, loss)


def build(settings: DdpmSettings, process: distributed.Process, config: dict[str, Any] | None) -> UNet2DModel:
    """Return a fresh network, or one as a state describes it."""
    if settings.patch_size % (multiple := 2 ** (len(settings.widths) - 1)):
        raise errors.UserError(f"--patch_size must be a multiple of {multiple} here, not {settings.patch_size}")
    if config:
        return UNet2DModel(**config)
    seed_all(settings.seed)
    return small_unet(settings.widths)


def save_pipeline(scheduler: DDPMScheduler, net: UNet2DModel, folder: Path, epoch: int) -> None:
    """Write network and scheduler as a DDPM pipeline of diffusers into the folder `pretrained` of the run's folder."""
    write_folder_atomic(folder / "pretrained", DDPMPipeline(net, scheduler).save_pretrained)


def main() -> None:
    settings = parse_settings(__doc__, DdpmSettings)
    scheduler = schedule()
    run, unlogged = open_run(settings, distributed.start(settings.device), build)
    run.save_checkpoint = partial(save_pipeline, scheduler)
    finished = train(run, partial(train_step, scheduler), unlogged)
    if run.log:
        run.log.close()
    distributed.stop()
    if not finished:
        sys.exit(errors.INTERRUPTED)


if __name__ == "__main__":
    errors.run(main)
