"""Test sets: a folder of pictures below the data folder, or `Samples`, eight photographs that need no files."""
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import skimage

from utils.data.images import list_pictures, read_picture
from utils.errors import UserError, listed

KNOWN_SETS = {
    "Set11": "the 11 grey 256x256 and 512x512 images distributed with the code of ReconNet and ISTA-Net",
    "CBSD68": "the 68 colour test images of DnCNN and FFDNet, from the Berkeley Segmentation Dataset (BSDS300)",
    "Urban100": "256x256 centre crops of 100 photographs of buildings (Huang et al., CVPR 2015; project SelfExSR)",
    "DIV2K": "256x256 centre crops of NTIRE 2017's 100 validation images (data.vision.ee.ethz.ch/cvl/DIV2K)",
}
# The photographs that scikit-image's package itself holds: nothing is downloaded.
SAMPLES = ("astronaut.png", "brick.png", "camera.png", "chelsea.png", "coffee.png", "coins.png",
           "motorcycle_left.png", "rocket.jpg")
SAMPLE_SIZE = 256


@dataclass(frozen=True, eq=False)
class Picture:
    """One picture of a test set."""

    name: str  # the file's name without suffix; with it where another file of the set is called so
    luminance: np.ndarray  # uint8 (H, W)
    ycrcb: np.ndarray | None = None  # uint8 (H, W, 3); None for a grey picture
    file: str | None = None  # the file's name with suffix, which does not depend on the other files of the set


def load_testset(name: str, data_dir: str | os.PathLike = "data") -> list[Picture]:
    """Read all pictures of the folder data_dir/name, sorted; or the `Samples`, 256×256 centre crops.

    All are read at once, so that an unreadable one is found before any work is done.
    Raises UserError where the folder is missing or empty, or a picture cannot be read.
    """
    folder = Path(data_dir) / name
    if name == "Samples":
        if folder.exists():
            raise UserError(f"Samples are photographs that need no files; rename {folder} to have your own tested")
        return [_sample(file) for file in SAMPLES]
    if not folder.is_dir():
        raise UserError(_missing(name, folder))
    paths = list_pictures(folder)
    if not paths:
        raise UserError(f"{folder} holds no picture (PNG, TIFF, BMP or JPEG); put the test set's files there")
    names = Counter([path.stem for path in paths] + [path.name for path in paths])
    return [Picture(path.stem if names[path.stem] == 1 else path.name, *read_picture(path), path.name)
            for path in paths]


def _sample(file: str) -> Picture:
    luminance, ycrcb = read_picture(Path(skimage.__file__).parent / "data" / file)
    top, left = ((side - SAMPLE_SIZE) // 2 for side in luminance.shape)
    centre = np.s_[top:top + SAMPLE_SIZE, left:left + SAMPLE_SIZE]
    return Picture(Path(file).stem, luminance[centre], None if ycrcb is None else ycrcb[centre], file)


def _missing(name: str, folder: Path) -> str:
    if name in KNOWN_SETS:
        return (f"there is no folder {folder}: put {name} there, {KNOWN_SETS[name]} (python -m utils.download {name} "
                "fetches it); or try the test set Samples")
    there = sorted(next(os.walk(folder.parent), ("", [], []))[1])
    return (f"there is no folder {folder}: a test set is a folder of pictures in {folder.parent}"
            f"{f', which has {listed(there)}' if there else ''}; or Samples, which needs no files")
