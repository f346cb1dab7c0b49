"""Test sets: a folder of pictures below the data folder, or `Samples`, eight photographs that need no files."""
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import skimage

from utils.data.images import SUFFIXES, is_picture_name, list_pictures, read_picture
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


def testset_names(text: str, data_dir: str | os.PathLike) -> list[str]:
    """Split what a user says, such as Set11,CBSD68 or Set11/CBSD68 or Classic/Set5, into the names of test sets."""
    names = []
    for part in filter(None, (part.strip().rstrip("/") for part in text.split(","))):
        names += [part] if _path(part, data_dir).exists() else [name.strip() for name in part.split("/") if name]
    if not names or not all(name.strip(".") for name in names):
        raise UserError(f"--testset_name must be a folder in {data_dir}, or several as Set11,CBSD68, not {text}")
    return list(dict.fromkeys(names))


def result_name(name: str) -> str:
    """Return the folder of a test set's results: its name; of a path that leads elsewhere, or to a file, the last part.
    """
    path = Path(name).expanduser()
    if path.suffix.lower() in SUFFIXES:
        return path.stem
    return path.name if path.is_absolute() or ".." in path.parts else name


def load_testset(name: str, data_dir: str | os.PathLike = "data") -> list[Picture]:
    """Read all pictures of the folder data_dir/name, sorted; or of another folder, or a single file, by its path; or
    the `Samples`, 256×256 centre crops.

    All are read at once, so that an unreadable one is found before any work is done.
    Raises UserError where the folder is missing or holds no picture, or a picture cannot be read.
    """
    path = _path(name, data_dir)
    if name == "Samples":
        if path.exists():
            raise UserError(f"Samples are photographs that need no files; rename {path} to have your own tested")
        return [_sample(file) for file in SAMPLES]
    if path.is_file():
        return [Picture(path.stem, *read_picture(path), path.name)]
    if not path.is_dir():
        raise UserError(_missing(name, Path(data_dir) / name))
    paths = list_pictures(path)
    if not paths:
        below = sorted({str(file.parent.relative_to(path)) for file in path.rglob("*") if is_picture_name(file.name)})
        if below:
            sets = ",".join(below)
            raise UserError(f"{path} holds no picture itself; for those below it use --data_dir {path} "
                            f"--testset_name {sets if len(below) <= 5 else below[0]}")
        raise UserError(f"{path} holds no picture ({', '.join(SUFFIXES)}); put the test set's files there")
    names = Counter([path.stem for path in paths] + [path.name for path in paths])
    return [Picture(path.stem if names[path.stem] == 1 else path.name, *read_picture(path), path.name)
            for path in paths]


def passed_over(name: str, data_dir: str | os.PathLike = "data") -> list[str]:
    """Return the names in a test set's folder that are not read: files of other kinds, folders that hold pictures."""
    folder = _path(name, data_dir)
    if not folder.is_dir():
        return []
    entries = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    files = [path.name for path in entries if path.is_file() and not is_picture_name(path.name)]
    return files + [f"{path.name}{os.sep}" for path in entries
                    if path.is_dir() and any(is_picture_name(file) for file in os.listdir(path))]


def _path(name: str, data_dir: str | os.PathLike) -> Path:
    """The folder or file that a name means: one in the data folder, else one that it is the path of."""
    inside, path = Path(data_dir) / name, Path(name).expanduser()
    leads_elsewhere = path.is_file() or (path.is_dir() and len(path.parts) > 1)
    return path if leads_elsewhere and not inside.exists() else inside


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
