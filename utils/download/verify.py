"""Checks that data sets and weights are what they should be: names, counts, sizes, and a checksum for every picture.

A picture has two checksums: of its file, and of its decoded pixels, for the same pixels can be written as many files.
`checksums.json` is {set: {file: {bytes, sha256, shape, dtype, pixels}}}, where `pixels` is the SHA-256 of the pixels
in RGB order, rows from top to bottom.
"""
import hashlib
import io
import itertools
import json
import math
import os
import struct
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from utils.data.images import MAX_PIXELS, is_picture_name
from utils.errors import first_line, listed, printable

CHECKSUMS = json.loads(Path(__file__).with_name("checksums.json").read_text(encoding="utf-8"))
WATERLOO = 4744  # pictures

Known = dict[str, dict]  # {file: its entry in checksums.json}


# --- one picture ---------------------------------------------------------------------------------------------------

def verdict(
    content: bytes,  # of a file
    known: dict,  # what it should be
) -> str:
    """"file" where it is byte for byte the known file, "pixels" where its pixels are; else what is wrong with it."""
    if _sha256(content) == known["sha256"]:
        return "file"
    pixels = _decode(content)
    if pixels is None:
        return f"is damaged or no picture ({len(content):,} bytes, not {known['bytes']:,})"
    if list(pixels.shape) != known["shape"] or str(pixels.dtype) != known["dtype"]:
        return f"is {_format(pixels.shape, pixels.dtype)}, not {_format(known['shape'], known['dtype'])}"
    if _sha256(pixels) == known["pixels"]:
        return "pixels"
    return f"has the wrong checksum (SHA-256 of the file {_sha256(content)[:12]}…, not {known['sha256'][:12]}…; of " \
           f"the pixels {_sha256(pixels)[:12]}…, not {known['pixels'][:12]}…)"


def find(
    content: bytes,  # of a picture's file
    wanted: Known,
    shifts: range = range(1),  # by how many pixels, either way, a wanted picture may lie off the centre of a larger one
) -> tuple[str, bytes] | None:
    """Return (name, content to write) of the wanted file that this is or contains, told by checksums alone, or None.

    A file that is byte for byte the wanted one is written as it is; what has its pixels, anew and without loss.
    """
    digest = _sha256(content)
    for file, known in wanted.items():
        if known["sha256"] == digest:
            return file, content
    pixels = _decode(content)
    if pixels is None:
        return None
    by_pixels = {(known["pixels"], tuple(known["shape"]), known["dtype"]): file for file, known in wanted.items()}
    for shape in sorted({tuple(known["shape"]) for known in wanted.values()}):
        for window in _windows(pixels, shape, shifts):
            file = by_pixels.get((_sha256(window), window.shape, str(window.dtype)))
            if file is not None:
                bgr = window[..., ::-1] if window.ndim == 3 else window
                return file, cv2.imencode(Path(file).suffix, np.ascontiguousarray(bgr))[1].tobytes()
    return None


def _windows(pixels: np.ndarray, shape: tuple[int, ...], shifts: range) -> Iterator[np.ndarray]:
    """Yield cut-outs of that shape at the picture's centre and shifted from there, the nearest first."""
    spare = [have - want for have, want in zip(pixels.shape[:2], shape[:2], strict=True)]
    if pixels.shape[2:] != shape[2:] or min(spare) < 0:
        return
    for shift in sorted(itertools.product(shifts, repeat=2), key=lambda shift: shift[0]**2 + shift[1]**2):
        top, left = (room // 2 + pixel for room, pixel in zip(spare, shift, strict=True))
        if 0 <= top <= spare[0] and 0 <= left <= spare[1]:
            yield np.ascontiguousarray(pixels[top:top + shape[0], left:left + shape[1]])


def _decode(content: bytes) -> np.ndarray | None:
    """Return grey (H, W) or RGB (H, W, 3) pixels; None where it is no picture, or one of absurd size."""
    try:
        with Image.open(io.BytesIO(content)) as picture:  # reads the header alone
            if math.prod(picture.size) > MAX_PIXELS:
                return None
        pixels = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_ANYCOLOR | cv2.IMREAD_ANYDEPTH)
    except Exception:  # what a damaged header can raise is not written down anywhere
        return None
    return pixels[..., ::-1] if pixels is not None and pixels.ndim == 3 else pixels


def _sha256(content: bytes | np.ndarray) -> str:
    return hashlib.sha256(content if isinstance(content, bytes) else np.ascontiguousarray(content)).hexdigest()


def _format(shape: tuple[int, ...], dtype: str) -> str:
    return f"{shape[1]}x{shape[0]} {'colour' if len(shape) == 3 else 'grey'} {dtype}"


# --- a test set ----------------------------------------------------------------------------------------------------

def check_testset(name: str, folder: Path) -> bool:
    """Print what is right and wrong about a test set; True where all of it is right."""
    verdicts = {file: _look(folder / file, known) for file, known in CHECKSUMS[name].items()}
    count = Counter(verdicts.values())
    right = count["file"] + count["pixels"]
    how = [f"{count[kind]} by the checksum of the {kind}" for kind in ("file", "pixels") if count[kind]]
    print(f"{name}: {right} of {len(verdicts)} pictures in {folder} are right{': ' * bool(how)}{', '.join(how)}")
    missing = [file for file, found in verdicts.items() if found == "missing"]
    if missing:
        print(f"  missing: {listed(missing)}; python -m utils.download {name} fetches what is missing")
    for file, found in verdicts.items():
        if found not in ("file", "pixels", "missing"):
            print(f"  {file} {found}; it is left alone: to have the right one fetched, move it away")
    extra = sorted(entry for entry in os.listdir(folder) if entry not in verdicts) if folder.is_dir() else []
    pictures = [entry for entry in extra if is_picture_name(entry)]
    others = [entry for entry in extra if entry not in pictures]
    if pictures:
        print(f"  not of this set, though test.py would average over them: {listed(map(repr, pictures))}")
    if others:
        print(f"  also there, and ignored: {listed(map(repr, others))}")
    return right == len(verdicts) and not pictures


def _look(path: Path, known: dict) -> str:
    if not os.path.lexists(path):
        return "missing"
    try:
        return verdict(path.read_bytes(), known)
    except OSError as error:
        return f"cannot be read ({first_line(error)})"


# --- what is fetched by hand ---------------------------------------------------------------------------------------

def check_waterloo(folder: Path) -> bool:
    """Print whether the training pictures are all there and complete; their checksums are not known."""
    files = sorted(path for path in folder.rglob("*") if is_picture_name(path.name) and path.is_file())
    broken = [path.name for path in files if not _is_complete_bmp(path)]
    print(f"Waterloo: {len(files) - len(broken):,} complete BMP files of {WATERLOO:,} in {folder}, by header and "
          "length (no checksums are known)")
    if broken:
        print(f"  cut short, or no BMP: {listed(map(repr, broken))}")
    return len(files) == WATERLOO and not broken


def _is_complete_bmp(path: Path) -> bool:
    """Return whether the file starts as a BMP does and is as long as its header says."""
    try:
        with open(path, "rb") as file:
            header = file.read(34)
        start, size, width, height, _, depth, compression = struct.unpack("<2x8xIIiiHHI", header)
    except (OSError, struct.error):
        return False
    if header[:2] != b"BM" or size < 40 or width < 1 or height == 0:
        return False
    row = (width * depth + 31) // 32 * 4
    return compression != 0 or path.stat().st_size >= start + row * abs(height)


def check_weights(path: Path) -> bool:
    """Print whether a file has weights of the published keys and shapes; it is mapped into memory, not loaded."""
    import torch

    from model import IDM, WeightsError  # here, since it takes seconds that nothing else needs
    from model.checkpoint import read_official

    with torch.device("meta"):
        published = {key: tuple(tensor.shape) for key, tensor in IDM((320, 640), 3).official_state_dict().items()}
    try:
        found = {key: tuple(tensor.shape) for key, tensor in read_official(path).items()}
    except WeightsError as error:
        print(f"weights: {printable(str(error))}")
        return False
    wrong = [f"{key} is {found.get(key, 'missing')}, not {shape}" for key, shape in published.items()
             if found.get(key) != shape]
    wrong += [f"{key} does not belong there" for key in found if key not in published]
    print(f"weights: {path} does not fit: {listed(wrong, 3)}" if wrong else
          f"weights: {path} holds the {len(published):,} published keys and shapes (its checksum is not known)")
    return not wrong
