"""Inpainting: some pixels are seen, the others are not (random ones, a box, what text covers, or what a file says)."""
import math
from pathlib import Path
from typing import Literal

import cv2
import torch
from torch import Tensor

from .base import LinearOperator

ANCHORS = [(row / 2, column) for row in range(3) for column in range(2)]  # of a letter's strokes, in its own height


class Inpainting(LinearOperator):
    """y = mask · x; A Aᵀ is a projection.

    Args:
        mask: (H, W); True or 1 where a pixel is seen.

    Raises:
        ValueError: where the mask has other values or dimensions, or hides everything.
    """

    same_for_all = tight = True

    def __init__(self, mask: Tensor):
        super().__init__()
        if mask.ndim != 2 or not bool(((mask == 0) | (mask == 1)).all()) or not bool(mask.any()):
            raise ValueError("a mask must be (H, W), of 0 and 1, and not all 0")
        self.image_shape = tuple(mask.shape)
        self.register_buffer("mask", mask.float())

    @classmethod
    def random(
        cls,
        image_shape: tuple[int, int],  # (H, W)
        generator: torch.Generator,  # on the CPU
        keep: float = 0.5,  # the share of pixels that is seen
        kind: Literal["pixels", "box", "text"] = "pixels",  # what hides the others
        mask: Path | None = None,  # a picture in place of both: seen is what is brighter than middle grey
    ) -> "Inpainting":
        """Draw a mask; a file's must be of the size of the images."""
        if mask is not None:
            return cls(_read_mask(mask, image_shape))
        if not 0 < keep <= 1:
            raise ValueError(f"keep must lie in (0, 1], not {keep}")
        draw = {"pixels": _pixels, "box": _box, "text": _text}
        if kind not in draw:
            raise ValueError(f"kind must be one of {', '.join(draw)}, not {kind}")
        return cls(draw[kind](image_shape, keep, generator))

    def A(self, x: Tensor) -> Tensor:
        """(batch, channels, H, W) -> the same, 0 where nothing is seen."""
        self.check_image(x)
        return x * self.mask

    def A_adjoint(self, y: Tensor) -> Tensor:
        self.check_image(y)
        return y * self.mask

    def measured(self, y: Tensor) -> float:
        return float(self.mask.sum()) * y.shape[1]


def _pixels(shape: tuple[int, int], keep: float, generator: torch.Generator) -> Tensor:
    pixels = math.prod(shape)
    mask = torch.zeros(pixels)
    mask[torch.randperm(pixels, generator=generator)[:max(1, round(keep * pixels))]] = 1
    return mask.view(shape)


def _box(shape: tuple[int, int], keep: float, generator: torch.Generator) -> Tensor:
    """A hidden box of the image's proportions, somewhere in it."""
    sides = [min(round((1 - keep) ** 0.5 * side), side - 1) if side > 1 else 0 for side in shape]
    top, left = (int(torch.randint(side - hidden + 1, (), generator=generator))
                 for side, hidden in zip(shape, sides, strict=True))
    mask = torch.ones(shape)
    mask[top:top + sides[0], left:left + sides[1]] = 0
    return mask


def _text(shape: tuple[int, int], keep: float, generator: torch.Generator) -> Tensor:
    """Words of letter-like strokes, one after another, until no more than `keep` is left."""
    mask, height = torch.ones(shape), max(6.0, min(shape) / 10)
    while float(mask.mean()) > keep and mask.sum() > 1:
        letters = int(torch.randint(3, 9, (), generator=generator))
        start = torch.rand(2, generator=generator) * torch.tensor(shape) - height / 2
        for letter in range(letters):
            corner = start + torch.tensor([0.0, 0.75 * height * letter])
            anchors = torch.randperm(len(ANCHORS), generator=generator)[:4]
            points = [corner + height * torch.tensor([row, 0.5 * column])
                      for row, column in (ANCHORS[anchor] for anchor in anchors)]
            for a, b in zip(points, points[1:], strict=False):
                _stroke(mask, a, b, radius=height / 14)
    if not mask.any():
        mask.view(-1)[0] = 1
    return mask


def _stroke(mask: Tensor, a: Tensor, b: Tensor, radius: float) -> None:
    """Hide the pixels that are no farther than the radius from the line between two points (row, column)."""
    radius = max(radius, 0.5)
    low = (torch.minimum(a, b) - radius).floor().int().clamp(min=0).tolist()
    high = (torch.maximum(a, b) + radius).ceil().int().tolist()
    part = mask[low[0]:max(high[0] + 1, 0), low[1]:max(high[1] + 1, 0)]
    rows, columns = torch.meshgrid(*(torch.arange(start, start + size, dtype=torch.float32)
                                     for start, size in zip(low, part.shape, strict=True)), indexing="ij")
    along = b - a
    t = ((rows - a[0]) * along[0] + (columns - a[1]) * along[1]) / along.square().sum().clamp(min=1e-6)
    t = t.clamp(0, 1)
    part[(rows - a[0] - t * along[0]) ** 2 + (columns - a[1] - t * along[1]) ** 2 <= radius**2] = 0


def _read_mask(path: Path, image_shape: tuple[int, int]) -> Tensor:
    try:
        picture = cv2.imread(str(path), cv2.IMREAD_GRAYSCALE)
    except cv2.error:  # of more pixels than OpenCV takes
        picture = None
    if picture is None:
        raise ValueError(f"the mask {path} is no picture that can be read")
    if picture.shape != tuple(image_shape):
        raise ValueError(f"the mask {path} is {picture.shape[0]}x{picture.shape[1]}, but the images are "
                         f"{image_shape[0]}x{image_shape[1]}")
    return torch.from_numpy(picture > 127)
