"""What is drawn for each batch of training: how its crops are turned, and the operator that measures them."""
from collections.abc import Mapping
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
    operator: nn.Module  # A, the same for all crops of the batch

    def turned(self, pixels: Tensor) -> Tensor:
        """Return crops (batch, 1, P, P) uint8 as float32 in [0, 1], all turned alike."""
        x = (pixels.float() / 255).rot90(self.symmetry % 4, (2, 3))
        return x.flip(3) if self.symmetry >= 4 else x


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
        self.settings = settings
        self.measurement = Measurement("cs", {"cs_ratio": max(settings.cs_ratio.values),
                                              "block_size": settings.block_size})
        self.shared: Mapping[int, dict[str, Any]] = {
            slot: self.measurement.shared(device, seed=matrix_seed(settings.seed, slot)) for slot in slots}

    def draw(self, iteration: int, slot: int) -> Draw:
        generator = torch.Generator().manual_seed(seed_of(self.settings.seed, iteration, slot))
        measurement = self.measurement.with_settings(cs_ratio=self.settings.cs_ratio.draw(generator))
        symmetry = int(torch.randint(8, (), generator=generator))
        side = self.settings.patch_size
        return Draw(symmetry, measurement.draw((side, side), generator, self.shared[slot]))


def matrix_seed(seed: int, slot: int) -> int:
    """Return the seed of a slot's sampling matrix: seed + slot, as published, but never the tests' for other seeds."""
    return seed + slot + (seed < TEST_SEED <= seed + slot)
