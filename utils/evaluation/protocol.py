"""How a network is tested."""
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from utils.data.testsets import Picture
from utils.devices import PRECISIONS
from utils.evaluation.spreading import Size, batches
from utils.measurement import Measurement


@dataclass(frozen=True)
class Protocol:
    """What is measured, and how the network computes; raises ValueError for a precision or a size that there is not."""

    measurement: Measurement = field(default_factory=Measurement)
    precision: str = "fp32"  # fp32, bf16 or fp16: what autocast computes in
    batch_size: int | None = 1  # so many pictures of one padded size together; None: what suits the device

    def __post_init__(self):
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, not {self.precision}")
        if self.batch_size is not None and self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {self.batch_size}")

    def sizes(self, pictures: Sequence[Picture]) -> list[Size]:
        """Return what is measured of each picture, (H, W): padded to what the operator needs and no more."""
        multiple = self.measurement.side_multiple
        shapes = [picture.luminance.shape for picture in pictures]
        return [(height + -height % multiple, width + -width % multiple) for height, width in shapes]

    def batches(self, pictures: Sequence[Picture], device: torch.device) -> list[list[int]]:
        """Return the numbers of the pictures to reconstruct together."""
        return batches(self.sizes(pictures), self.batch_size, device.type)
