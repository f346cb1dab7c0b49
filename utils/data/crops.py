"""Training crops: random windows of the luminance of a folder's pictures (paper, section 4)."""
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from utils.data.luminance_cache import open_pictures
from utils.errors import UserError, listed

NAMED = 10  # of the files that cannot be read


class TrainingCrops(Dataset):
    """Crop number i: a function of (seed, i) alone, whoever asks, in whatever order.

    So a run that was interrupted goes on with the very crops it would have seen, and the number of workers changes
    nothing. Every picture is decoded once, and kept as uint8 in a file that all processes share, or in memory.

    Args:
        folder: searched recursively for pictures.
        patch_size: P, the side of a crop in pixels.
        seed: of the run.
        cache_dir: where the decoded pictures of the folder are kept, for this run and later ones; None keeps them in
            memory, each process its own.

    Attributes:
        pictures: luminance, (H, W) uint8, of all pictures of the folder by number.
        numbers: of the pictures in use.
        names: theirs, relative to `folder`, sorted.
        unreadable: the names of files that cannot be read.
        notice: a sentence about the pictures left out (unreadable, or smaller than P either way), or "".

    Raises:
        UserError: where the folder is missing, no picture in it is of use, or the cache cannot be written.
    """

    def __init__(self, folder: str | Path, patch_size: int, seed: int = 2025,
                 cache_dir: str | Path | None = None):
        self.pictures = open_pictures(Path(folder), None if cache_dir is None else Path(cache_dir))
        names, smaller = self.pictures.names, self.pictures.shapes.min(1)
        self.numbers = np.flatnonzero(smaller >= patch_size)
        self.names = [names[number] for number in self.numbers]
        self.unreadable = [names[number] for number in np.flatnonzero(smaller == 0)]
        unreadable, small = len(self.unreadable), int(((smaller > 0) & (smaller < patch_size)).sum())
        total = len(names)
        reasons = [(unreadable, f"that cannot be read ({listed(self.unreadable, NAMED)})"),
                   (small, f"smaller than {patch_size}x{patch_size}")]
        left_out = " and ".join(f"{count} {reason}" for count, reason in reasons if count)
        if not self.names:
            raise UserError(f"none of the {total} pictures in {folder} can be used: {left_out}")
        self.notice = f"left out of {total} pictures: {left_out}" if left_out else ""
        self.patch_size, self.seed = patch_size, seed

    def __getitem__(self, index: int) -> Tensor:
        """Return crop `index`, any number from 0 on: (1, P, P) uint8."""
        random, size = np.random.default_rng((self.seed, index)), self.patch_size
        picture = self.pictures[self.numbers[random.integers(len(self.numbers))]]
        top = random.integers(picture.shape[0] - size + 1)
        left = random.integers(picture.shape[1] - size + 1)
        return torch.from_numpy(picture[top:top + size, left:left + size].copy())[None]

    def fingerprint(self) -> str:
        """Return what tells collections of pictures apart: their number, and a checksum of names and sizes."""
        listing = [f"{name} {tuple(shape)}" for name, shape in
                   zip(self.names, self.pictures.shapes[self.numbers].tolist(), strict=True)]
        checksum = zlib.crc32("\n".join(listing).encode(errors="surrogateescape"))
        return f"{len(listing)} (names and sizes {checksum:08x})"
