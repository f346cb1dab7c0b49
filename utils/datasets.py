"""Training crops: random windows of the luminance of a folder's pictures (paper, section 4)."""
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from utils.errors import UserError
from utils.images import SUFFIXES, read_picture


class TrainingCrops(Dataset):
    """Crop number i of rank r: a function of (seed, r, i) alone, whoever asks, in whatever order.

    So a run that was interrupted goes on with the very crops it would have seen, and the number of workers changes
    nothing. Every picture is decoded once, at the start, and kept as uint8.

    Args:
        folder: searched recursively for pictures.
        patch_size: P, the side of a crop in pixels.
        seed: of the whole run.
        rank: of this process; each draws other crops.

    Attributes:
        names: the pictures in use, relative to `folder`, sorted.
        pictures: their luminance, (H, W) uint8 each.
        notice: a sentence about the pictures left out (unreadable, or smaller than P either way), or "".

    Raises:
        UserError: where the folder is missing or no picture in it is of use.
    """

    def __init__(self, folder: str | Path, patch_size: int, seed: int = 2025, rank: int = 0):
        folder = Path(folder)
        if not folder.is_dir():
            raise UserError(f"there is no folder {folder}; give one with training pictures by --train_dir")
        paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
        if not paths:
            raise UserError(f"no picture ({', '.join(SUFFIXES)}) in {folder} or below it")
        with ThreadPoolExecutor() as pool:
            pictures = list(pool.map(_luminance, paths))
        unreadable = sum(picture is None for picture in pictures)
        kept = [(str(path.relative_to(folder)), picture) for path, picture in zip(paths, pictures, strict=True)
                if picture is not None and min(picture.shape) >= patch_size]
        small = len(paths) - unreadable - len(kept)
        reasons = [(unreadable, "that cannot be read"), (small, f"smaller than {patch_size}x{patch_size}")]
        left_out = " and ".join(f"{count} {reason}" for count, reason in reasons if count)
        if not kept:
            raise UserError(f"none of the {len(paths)} pictures in {folder} can be used: {left_out}")
        self.names = [name for name, _ in kept]
        self.pictures = [picture for _, picture in kept]
        self.notice = f"left out of {len(paths)} pictures: {left_out}" if left_out else ""
        self.patch_size, self.seed, self.rank = patch_size, seed, rank

    def __getitem__(self, index: int) -> Tensor:
        """Crop `index`, any number from 0 on: (1, P, P) uint8."""
        random, size = np.random.default_rng((self.seed, self.rank, index)), self.patch_size
        picture = self.pictures[random.integers(len(self.pictures))]
        top = random.integers(picture.shape[0] - size + 1)
        left = random.integers(picture.shape[1] - size + 1)
        return torch.from_numpy(picture[top:top + size, left:left + size].copy())[None]

    def fingerprint(self) -> str:
        """Tells one collection of pictures from another by their number, names and sizes."""
        listing = [f"{name} {picture.shape}" for name, picture in zip(self.names, self.pictures, strict=True)]
        checksum = zlib.crc32("\n".join(listing).encode(errors="surrogateescape"))
        return f"{len(listing)} (names and sizes {checksum:08x})"


def _luminance(path: Path) -> np.ndarray | None:
    """(H, W) uint8; None for a file that cannot be read."""
    try:
        return read_picture(path)[0]
    except UserError:
        return None
