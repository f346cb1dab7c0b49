"""The luminance of a folder's pictures, decoded once: into a file that all processes map, or into memory.

The pixels lie one picture after another; an index, a JSON file beside the pixels, says of which files they are.
"""
import hashlib
import io
import json
import os
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

import cv2
import numpy as np
from tqdm import tqdm

from utils.data.images import find_pictures, read_picture
from utils.errors import UserError, first_line, is_first, note
from utils.files import lock, make_folder, write_atomic

FORMAT = f"luminance 2, decoded by OpenCV {cv2.__version__}"  # another version may decode a JPEG a little otherwise
BATCH = 64  # pictures that a few threads decode before they are written
UNUSABLE = (OSError, ValueError, LookupError, TypeError)  # what a damaged cache raises
CLOCK_STEP = 2 * 10**9  # ns; a second change within it may leave no trace in a file's times


class Pictures:
    """The pictures of a folder by number; those that cannot be read have shape (0, 0)."""

    def __init__(self, index: dict, content: np.ndarray | tuple[Path, int]):
        self.content = content  # uint8; or the arguments of `_map`, which a worker calls for itself
        self.names = list(index["files"])  # relative to the folder, sorted
        self.shapes = np.array([entry[-2:] for entry in index["files"].values()])  # (number, 2), heights and widths
        self.ends = self.shapes.prod(1).cumsum()

    def __getitem__(self, number: int) -> np.ndarray:
        """Return luminance, uint8 (H, W), not to be written to."""
        content = _map(*self.content) if isinstance(self.content, tuple) else self.content
        end, shape = self.ends[number], self.shapes[number]
        return content[end - shape.prod():end].reshape(shape)


def open_pictures(
    folder: Path,  # searched recursively
    cache_dir: Path | None = None,  # where pixels and index are kept; None decodes everything into memory
) -> Pictures:
    """Return all pictures of a folder, from its cache, which one of the processes that call this builds if need be.

    Raises UserError where there is no picture, where pictures change meanwhile, or the cache cannot be written.
    """
    if cache_dir is None:
        index = _write(memory := io.BytesIO(), folder)
        return Pictures(index, np.frombuffer(memory.getbuffer().toreadonly(), np.uint8))
    name = hashlib.sha256(f"{folder.resolve()} {FORMAT}".encode(errors="surrogateescape")).hexdigest()[:16]
    path = cache_dir / f"{name}.luminance"
    try:
        return _load(path, folder)  # needs no lock, nor a folder that can be written into
    except UNUSABLE:
        make_folder(cache_dir, "--cache_dir, or --no_cache")
    with lock(path.with_suffix(".lock"), waiting=f"another process that is reading {folder}"):
        try:
            return _load(path, folder)
        except UNUSABLE as error:
            if not isinstance(error, FileNotFoundError):
                note(f"the cache {path} is built again: {first_line(error)}")
        index = {}
        write_atomic(path, lambda file: index.update(_write(file, folder)))
        write_atomic(path.with_suffix(".json"), json.dumps(index).encode())
    return Pictures(index, (path.absolute(), index["checksum"]))


def _write(file: BinaryIO, folder: Path) -> dict:
    """Write the pixels of all pictures, with no more than a few of them in memory; returns the index."""
    started, files, read, checksum = time.time_ns(), find_pictures(folder), {}, 0
    with ThreadPoolExecutor(4) as pool:
        for first in tqdm(range(0, len(files), BATCH), "reading pictures", disable=None if is_first() else True):
            part = list(files)[first:first + BATCH]
            for name, (content, pixels) in zip(part, pool.map(_read, [folder / name for name in part]), strict=True):
                read[name] = *files[name], content, *pixels.shape
                checksum = zlib.crc32(pixels, checksum)
                file.write(pixels)
    if find_pictures(folder) != files:
        raise UserError(f"the pictures in {folder} changed while they were being read; start again when nothing "
                        "writes there any more")
    file.write(b"\0")  # an empty file cannot be mapped
    return {"started": started, "files": read, "checksum": checksum}


def _read(path: Path) -> tuple[int, np.ndarray]:
    """Return the CRC-32 of the file, and its luminance, uint8 (H, W); that is empty where it cannot be read."""
    try:
        return zlib.crc32(path.read_bytes()), read_picture(path)[0]
    except (OSError, UserError):
        return 0, np.empty((0, 0), np.uint8)


def _load(path: Path, folder: Path) -> Pictures:
    """Return the pictures of a cache; raises one of UNUSABLE where it cannot be used."""
    index, files = json.loads(path.with_suffix(".json").read_bytes()), find_pictures(folder)
    if zlib.crc32(np.memmap(path, np.uint8, "r")[:-1]) != index["checksum"]:
        raise ValueError("it is damaged")
    if list(files) != list(index["files"]):
        raise ValueError("pictures were added or removed")
    for name, (*stamp, checksum, _, width) in index["files"].items():  # where size and date cannot tell: by content
        now = list(files[name])
        touched = now != stamp or now[2] > index["started"] - CLOCK_STEP or os.name != "posix"
        if (now[:2] != stamp[:2] or (touched and width and zlib.crc32((folder / name).read_bytes()) != checksum)
                or (not width and _read(folder / name)[1].size)):
            raise ValueError(f"{name} has changed, or can be read now")
    return Pictures(index, (path.absolute(), index["checksum"]))


@lru_cache(maxsize=4)
def _map(path: Path, checksum: int) -> np.ndarray:
    if json.loads(path.with_suffix(".json").read_bytes())["checksum"] != checksum:
        raise ValueError(f"{path} was replaced while it was in use")
    return np.memmap(path, np.uint8, "r")
