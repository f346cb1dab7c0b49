"""Score other people's result pictures against a test set, and keep account of what could not be scored.

All methods are treated alike: a picture's scores are those of the file as it was written, with 8 bits a sample. test.py
scores its own reconstructions before it writes them. Rounding adds 1/12 to the mean squared error, so that its numbers
are higher by 0.006 dB at 30 dB and 0.06 dB at 40 dB. A colour file has the original's Cr and Cb, and clipping to RGB
where they do not go with the new Y moves that towards the original, by up to 0.14 dB on the Samples. So where its
scores.csv lies beside the pictures, its average is a row of its own, exactly as test.py prints it, and the largest
difference of a picture is told.
"""
import csv
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

from utils.comparison.matching import claimed_psnr, claimed_ssim, match
from utils.comparison.published import Published
from utils.data.images import list_pictures, read_picture
from utils.data.testsets import Picture
from utils.errors import UserError, first_line, printable
from utils.evaluation.metrics import psnr, ssim
from utils.files import csv_cell
from utils.flags import percent

LIMITED_RANGE = 3  # dB that stretching 16..235 to 0..255 must gain for values to be taken for such, of coarse pictures
PSNR_TOLERANCE = 0.1  # dB by which a file's name may differ from what the file scores
SSIM_TOLERANCE = 0.01  # its kinds differ by some thousandths: windows uniform or Gaussian, borders with or without


class Score(NamedTuple):
    """What one file scores on the Y channel."""

    file: Path
    psnr: float  # dB; inf where equal to the ground truth
    ssim: float  # nan for pictures smaller than SSIM's window
    colour: bool = False  # whether the file is in colour


class Recorded(NamedTuple):
    """What test.py scored before rounding to 8 bits."""

    psnr: float
    ssim: float


class Remark(NamedTuple):
    """Something about a method's files that a reader must know."""

    kind: str  # missing, extra, ambiguous, wrong size, unreadable, range, or claim
    text: str
    picture: str = ""
    file: str = ""


class Average(NamedTuple):
    psnr: float
    ssim: float
    count: int  # pictures; with none, the averages are nan


@dataclass
class Method:
    """A method's scored pictures, in the test set's order, and what there is to say about the others."""

    name: str
    folder: Path
    scores: dict[str, Score] = field(default_factory=dict)  # by picture
    remarks: list[Remark] = field(default_factory=list)
    recorded: dict[str, Recorded] = field(default_factory=dict)  # what test.py's scores.csv says of those scored

    def average(self, pictures: Iterable[str] | None = None) -> Average:
        """Over those of `pictures` that it has, or over all that it has."""
        return _average(self.scores[name] for name in self.scores if pictures is None or name in pictures)

    def recorded_average(self) -> Average:
        """Of test.py's own scores, from before rounding; over none where there is no scores.csv."""
        return _average(self.recorded.values())


@dataclass
class Comparison:
    """Several methods on one test set at one ratio."""

    testset: str
    cs_ratio: float
    pictures: list[str]  # all of the test set
    methods: list[Method]
    published: list[Published] = field(default_factory=list)

    @property
    def common(self) -> list[str]:
        """The pictures that all methods have, but those that have none: averages over others do not compare."""
        scored = [method.scores for method in self.methods if method.scores]
        return [name for name in self.pictures if scored and all(name in scores for scores in scored)]

    @property
    def alike(self) -> bool:
        """Whether all methods have the same pictures, or none."""
        return all(len(method.scores) in (0, len(self.common)) for method in self.methods)

    @property
    def title(self) -> str:
        return f"{printable(self.testset)} at {percent(self.cs_ratio)} %"


def ratio_names(cs_ratio: float) -> list[str]:
    """Return how folders of results at a ratio may be named: 10, as test.py does, or 0.1, or 0.10."""
    return [percent(cs_ratio), f"{cs_ratio:g}", f"{cs_ratio:.2f}"]


def find_folder(
    folder: Path,
    testset: str,
    cs_ratio: float,
    one_set: bool = True,  # whether all results are of this test set, so that folders need not name it
    one_ratio: bool = True,  # and at this ratio
) -> Path:
    """Return where a method's pictures are: FOLDER/SET/RATIO, as test.py writes, FOLDER/SET, FOLDER/RATIO or FOLDER.

    Raises UserError where it does not exist or cannot be searched, or none of these has a picture.
    """
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}; a method is given as NAME=FOLDER, a folder of its pictures")
    names = ratio_names(cs_ratio)
    levels = [Path(testset, name) for name in names] + [Path(testset)] * one_ratio
    levels += [Path(name) for name in names] * one_set + [Path()] * (one_set and one_ratio)
    try:
        for level in levels:
            if (folder / level).is_dir() and list_pictures(folder / level):
                return folder / level
    except OSError as error:
        raise UserError(f"cannot search {folder}: {first_line(error)}") from error
    raise UserError(f"{folder} holds no picture of {testset} at {percent(cs_ratio)} %: neither "
                    f"{' nor '.join(str(folder / level) for level in (levels[0], levels[-1]))} has one")


def score_method(
    name: str,
    folder: Path,
    pictures: list[Picture],  # the test set
    aliases: dict[str, str] | None = None,  # other names of its pictures, in the names of files
    progress: Callable[[Iterable], Iterable] = iter,  # wraps what is iterated over, as tqdm does
) -> Method:
    """Score every file of `folder` that shows a picture of the test set; the others become remarks.

    Raises UserError where no file is named after a picture of the set.
    """
    paths = {path.name: path for path in list_pictures(folder)}
    found = match([picture.name for picture in pictures], paths, aliases)
    if found.extra and len(found.extra) == len(paths):
        raise UserError(f"no file in {folder} is named after a picture of the test set: {found.extra[0]}, say, must "
                        f"begin with a name like {pictures[0].name}; --names tells what other names mean")
    method = Method(name, folder)
    for picture in progress(pictures):
        if picture.name in found.files:
            _score(method, picture, paths[found.files[picture.name]])
    recorded = _recorded(folder / "scores.csv")
    method.recorded = {name: recorded[name] for name in method.scores if name in recorded}
    note = method.remarks.append
    for picture in found.missing:
        note(Remark("missing", picture, picture))
    for picture, files in found.rivals.items():
        note(Remark("ambiguous", f"{picture} may be {' or '.join(files)}", picture, " | ".join(files)))
    for file, names in found.unclear.items():
        note(Remark("ambiguous", f"{file} may show {' or '.join(names)}", " | ".join(names), file))
    for file in found.extra:
        note(Remark("extra", file, file=file))
    return method


def shown_pixels(luminance: np.ndarray, ycrcb: np.ndarray | None) -> np.ndarray:
    """Return what `read_picture` returned, to look at: grey (H, W), or RGB (H, W, 3) within 2 levels of the file."""
    return luminance if ycrcb is None else cv2.cvtColor(ycrcb, cv2.COLOR_YCrCb2RGB)


def gap(a: float, b: float) -> float:
    """Return |a - b|; 0 where both are inf, or both nan; inf where one of them is."""
    if a == b or (np.isnan(a) and np.isnan(b)):
        return 0.0
    return np.inf if np.isnan(a) or np.isnan(b) else abs(a - b)


def rounding_effect(psnr: float) -> float:
    """Return by how many dB rounding to integers should lower a PSNR: the error's variance grows by 1/12."""
    with np.errstate(over="ignore"):  # a file's name may claim anything
        return float(10 * np.log10(1 + np.float64(10) ** (psnr / 10) / (12 * 255**2)))


def _score(method: Method, picture: Picture, path: Path) -> None:
    try:
        luminance, ycrcb = read_picture(path)
    except UserError as error:
        method.remarks.append(Remark("unreadable", str(error), picture.name, path.name))
        return
    if luminance.shape != picture.luminance.shape:
        sizes = (f"{height}x{width}" for height, width in (luminance.shape, picture.luminance.shape))
        method.remarks.append(Remark("wrong size", f"{path.name} is {' instead of '.join(sizes)} (height x width)",
                                     picture.name, path.name))
        return
    score = Score(path, psnr(picture.luminance, luminance), ssim(picture.luminance, luminance), ycrcb is not None)
    method.scores[picture.name] = score
    coarse_truth, coarse = _coarse(picture.luminance), _coarse(luminance)
    if psnr(coarse_truth, _stretched(coarse)) > psnr(coarse_truth, coarse) + LIMITED_RANGE:
        stretched = psnr(picture.luminance, _stretched(luminance))
        text = (f"{picture.name} seems to have values from 16 to 235 instead of 0 to 255: it scores {score.psnr:.2f} "
                f"dB, {stretched:.2f} dB if they are stretched")
        method.remarks.append(Remark("range", text, picture.name, path.name))
    for claimed, scored, tolerance, shown in ((claimed_psnr(path.name), score.psnr, PSNR_TOLERANCE, "{:.2f} dB"),
                                              (claimed_ssim(path.name), score.ssim, SSIM_TOLERANCE, "SSIM {:.4f}")):
        if claimed is not None and gap(claimed, scored) > tolerance + 1e-9:
            text = f"{picture.name} claims {shown.format(claimed)}, scores {shown.format(scored)}"
            if shown.endswith("dB") and 0 < claimed - scored <= tolerance + rounding_effect(claimed) < np.inf:
                text += ", as rounding to 8 bits may explain"
            method.remarks.append(Remark("claim", text, picture.name, path.name))


def _coarse(luminance: np.ndarray) -> np.ndarray:
    """Return means over squares of 16x16, which tell the range of values from what a reconstruction lacks in detail."""
    height, width = (min(side, max(4, side // 16)) for side in luminance.shape)
    return cv2.resize(luminance.astype(np.float64), (width, height), interpolation=cv2.INTER_AREA)


def _stretched(luminance: np.ndarray) -> np.ndarray:
    return (luminance - 16.0) * 255 / 219


def _average(scores: Iterable[Score | Recorded]) -> Average:
    numbers = [(score.psnr, score.ssim) for score in scores]
    return Average(*np.mean(numbers, axis=0).tolist(), len(numbers)) if numbers else Average(np.nan, np.nan, 0)


def _recorded(path: Path) -> dict[str, Recorded]:
    """Return the scores that test.py wrote; none where the file is missing or somebody else's."""
    try:
        with open(path, newline="", encoding="utf-8") as file:
            return {csv_cell(row["name"]): Recorded(float(row["psnr"]), float(row["ssim"]))
                    for row in csv.DictReader(file)}
    except (OSError, ValueError, KeyError, TypeError, csv.Error):
        return {}
