"""Which picture of a test set a file of somebody's results shows, and what its name says it scores.

Published files are named `Barbara.tif_ratio_0.1_PSNR_32.78_SSIM_0.9379.png`, `barbara_rec.png`, `IDM-BARBARA.jpg`.
Names are compared word by word, so that `img_1` is not found in `img_10`, nor `house` in `lighthouse`.
"""
import csv
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from utils.data.images import RESULT_NAME, SUFFIXES, file_stem
from utils.errors import UserError, first_line

_NUMBER = r"\d+(?:[.,]\d+)?|(?:inf|nan)(?![^\W_])"
_PSNR = re.compile(rf"_?psnr[\s_=:-]*({_NUMBER})(?:[\s_]*dB(?=ssim|[\W_]|$))?", re.IGNORECASE)
_SSIM = re.compile(rf"_?ssim[\s_=:-]*?((?:(?<=[\s_=:-])-)?(?:{_NUMBER}))", re.IGNORECASE)  # -0.1 in "SSIM_-0.1"
_RATIO = re.compile(rf"_?(?<![^\W_])(?:cs_?)?ratio[\s_=:-]*(?:{_NUMBER})", re.IGNORECASE)


@dataclass
class Matching:
    """The files of a folder and the pictures of a test set, each of them in exactly one of these."""

    files: dict[str, str] = field(default_factory=dict)  # picture -> the one file that shows it
    missing: list[str] = field(default_factory=list)  # pictures that no file shows
    extra: list[str] = field(default_factory=list)  # files that show no picture of the set
    rivals: dict[str, list[str]] = field(default_factory=dict)  # picture -> the files that all seem to show it
    unclear: dict[str, list[str]] = field(default_factory=dict)  # file -> the pictures that it may show


def match(
    pictures: Iterable[str],  # the names of a test set, each once, mostly without suffix
    files: Iterable[str],  # file names with suffix
    aliases: dict[str, str] | None = None,  # other names of pictures
) -> Matching:
    """Find for each picture the file that shows it; where that takes a guess, none is made.

    A file shows the picture whose very name it has, suffix and scores aside; else the one whose words stand among
    its words. Of `img` and `img_1` the longer counts. Where several are left, the first word decides if all others
    are mere numbers (`3_rec_10`). Last, `test001` is `test_01`, and `Lena_256` is `lena256`.
    """
    names, result, claimants = {picture: picture for picture in pictures} | (aliases or {}), Matching(), {}
    pictures = list(dict.fromkeys(names.values()))
    for file in files:
        candidates = list(dict.fromkeys(names[name] for name in _candidates(file, list(names))))
        if not candidates:
            result.extra.append(file)
        elif len(candidates) > 1:
            result.unclear[file] = candidates
        else:
            claimants.setdefault(candidates[0], []).append(file)
    disputed = {picture for candidates in result.unclear.values() for picture in candidates}
    for picture in pictures:
        found = claimants.get(picture, [])
        if len(found) == 1:
            result.files[picture] = found[0]
        elif found:
            result.rivals[picture] = found
        elif picture not in disputed:
            result.missing.append(picture)
    return result


def read_aliases(path: Path, pictures: set[str]) -> dict[str, str]:
    """Read a table (CSV) of other names of pictures: each line a name, a comma, and the picture that it means.

    Raises UserError where a line is not so.
    """
    try:
        rows = [[cell.strip() for cell in row] for row in csv.reader(path.read_text(encoding="utf-8-sig").splitlines())]
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"--names: cannot read {path} ({first_line(error)})") from error
    for number, row in enumerate(rows, 1):
        if row and (len(row) != 2 or not row[0] or row[1] not in pictures):
            raise UserError(f"--names: line {number} of {path} is {','.join(row)}, and not a name that files have, a "
                            "comma, and the name of a picture of the test set")
    return dict(filter(None, rows))


def claimed_psnr(file: str) -> float | None:
    """Return the PSNR in dB that a file's name claims, as in `_PSNR_32.78_`; None where it claims none."""
    return _claimed(_PSNR, file)


def claimed_ssim(file: str) -> float | None:
    """Return the SSIM that a file's name claims, as in `_SSIM_0.9379` or `_SSIM_-0.1`; None where it claims none."""
    return _claimed(_SSIM, file)


def _claimed(claim: re.Pattern, file: str) -> float | None:
    found = claim.findall(file)
    return float(found[-1].replace(",", ".")) if found else None  # a picture's own name may claim something, too


def _candidates(file: str, names: list[str]) -> list[str]:
    file = _normal(file)
    unclaimed = file
    for claim in (_PSNR, _SSIM, _RATIO):
        unclaimed = claim.sub("", unclaimed)
    stem, bare = _without_suffix(unclaimed), unclaimed
    while bare != (bare := _without_suffix(bare)):  # Barbara.tif__.png
        pass
    result = RESULT_NAME.fullmatch(file.rpartition(".")[0])
    for form in (result and result[1], file, _without_suffix(file), stem, bare):
        if exact := [name for name in names if form in (_normal(name), _normal(file_stem(name)))]:
            return exact
    return _by_words(_words(unclaimed), names) or [name for name in names if _loose(name) == _loose(bare) != []]


def _by_words(words: list[str], names: list[str]) -> list[str]:
    spans = []  # (start, end, name)
    for name in names:
        wanted = _words(name)
        spans += [(start, start + len(wanted), name) for start in range(len(words) - len(wanted) + 1)
                  if wanted and words[start:start + len(wanted)] == wanted]
    longest = [(start, end, name) for start, end, name in spans
               if not any(s <= start and end <= e and e - s > end - start for s, e, _ in spans)]
    first = [name for start, _, name in longest if start == 0]
    if len(first) == 1 and all(name.isdigit() for start, _, name in longest if start > 0):
        return first
    return list(dict.fromkeys(name for *_, name in longest))


def _without_suffix(name: str) -> str:
    stem = name.rpartition(".")[0] if name.lower().endswith(SUFFIXES) else name
    return stem.rstrip(" _-") or stem


def _normal(name: str) -> str:
    return unicodedata.normalize("NFC", name)  # macOS writes an umlaut as two characters


def _words(name: str) -> list[str]:
    return re.findall(r"[^\W_]+", _normal(name).casefold())


def _loose(name: str) -> list[str]:
    """Return runs of letters, and numbers without leading zeros."""
    return [part.lstrip("0") or "0" if part.isdigit() else part
            for part in re.findall(r"\d+|[^\W\d_]+", _normal(name).casefold())]
