"""What is drawn for each batch of training: how its crops are turned, and what measures them."""
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from utils.distributed import seed_of
from utils.measurement import Measurement
from utils.training.settings import TEST_SEED, Settings


@dataclass(frozen=True)
class Draw:
    """What one batch is trained with."""

    symmetry: int  # of the eight flips and rotations of a square
    operator: nn.Module | None = None  # A, the same for all crops of the batch
    measurement: Measurement | None = None  # of which the operator was drawn
    generator: torch.Generator | None = None  # of the noise
    steps: int | None = None  # of the sampling chain, 1 to T; None: all

    def turned(self, pixels: Tensor) -> Tensor:
        """Return crops (batch, 1, P, P) uint8 as float32 in [0, 1], all turned alike."""
        x = (pixels.float() / 255).rot90(self.symmetry % 4, (2, 3))
        return x.flip(3) if self.symmetry >= 4 else x

    def measure(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return y = A x + σ n and σ (batch,), drawn for each crop; A x and None where there is no noise."""
        return self.measurement.add_noise(self.operator.A(x), [self.generator] * len(x))


class Draws:
    """Draws for the batches of one process.

    A draw is a function of seed, iteration and slot, the batch's number among those of the iteration: a run that was
    interrupted repeats what it would have drawn, and so does another number of processes.

    Args:
        settings: of the run.
        slots: of this process, each with a sampling matrix of its own.
        device: to measure on.
    """

    def __init__(self, settings: Settings, slots: range, device: torch.device):
        self.settings, self.device = settings, device
        measured = settings.measured(settings.cs_ratio.values[-1:])
        self.measured: dict[int, list[tuple[Measurement, dict[str, Any]]]] = {
            slot: [(each, each.shared(device, seed=matrix_seed(settings.seed, slot))) for each in measured]
            for slot in slots}

    def draw(self, iteration: int, slot: int) -> Draw:
        """Draw what a batch is trained with. The order of the draws is part of what a run repeats."""
        settings, side = self.settings, self.settings.patch_size
        generator = torch.Generator().manual_seed(seed_of(settings.seed, iteration, slot))
        choices = self.measured[slot]
        measurement, shared = choices[_below(len(choices), generator) if len(choices) > 1 else 0]
        if "cs_ratio" in measurement.settings:
            measurement = measurement.with_settings(cs_ratio=settings.cs_ratio.draw(generator))
        symmetry = _below(8, generator)
        operator = measurement.draw((side, side), generator, shared).to(self.device)
        steps = 1 + _below(settings.step_number, generator) if settings.random_steps else None
        return Draw(symmetry, operator, measurement, generator, steps)


def _below(count: int, generator: torch.Generator) -> int:
    return int(torch.randint(count, (), generator=generator))


def matrix_seed(seed: int, slot: int) -> int:
    """Return the seed of a slot's sampling matrix: seed + slot, as published, but never the tests' for other seeds."""
    return seed + slot + (seed < TEST_SEED <= seed + slot)
