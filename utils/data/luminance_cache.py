"""The luminance of a folder's pictures, decoded once: into a file that all processes map, or into memory.

Either holds the same bytes: the pixels of one picture after another, an index (JSON), and a footer with a checksum of
all before it. A cache file is named after the folder and the names, sizes and dates of the pictures in it, so that a
changed folder gets another file; a finished file never changes.
"""
import fcntl
import hashlib
import io
import json
import mmap
import os
import stat
import struct
import sys
import zlib
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import cv2
import numpy as np
from filelock import FileLock, Timeout
from tqdm import tqdm

from utils.data.images import SUFFIXES, is_picture_name, read_picture
from utils.errors import UserError, first_line
from utils.files import write_whole

FORMAT = f"luminance 1, decoded by OpenCV {cv2.__version__}"  # another version may decode a JPEG a little otherwise
MAGIC = b"IDMluma1"
FOOTER = struct.Struct("<8sQI")  # magic, bytes of the index, CRC-32 of all before itself
UNCHECKED = 4  # bytes at the end, the CRC-32
RESIDENT = 64 * 2**20  # bytes of a mapped file that may count as memory of a process
THREADS = min(4, os.cpu_count() or 1)

Listing = dict[str, tuple[int, int]]  # of each picture file, by its name: its size in bytes and its date in ns


@dataclass(frozen=True, eq=False)
class Pictures:
    """The pictures of a folder that can be read, and where each lies among the pixels of all."""

    names: list[str]  # relative to the folder, sorted
    shapes: np.ndarray  # (number, 2) int64, heights and widths
    offsets: np.ndarray  # (number,) int64, of the first pixel of each
    unreadable: list[str]  # names of the files that cannot be read
    pixels: "np.ndarray | MappedFile"  # uint8

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, number: int) -> np.ndarray:
        """Luminance (H, W), uint8, not to be written to."""
        height, width = self.shapes[number].tolist()
        start = int(self.offsets[number])
        return self.pixels[start:start + height * width].reshape(height, width)

    def at_least(self, size: int) -> "Pictures":
        """Those of at least `size` pixels both ways; the pixels are shared."""
        large = np.flatnonzero(self.shapes.min(1) >= size)
        return replace(self, names=[self.names[number] for number in large], shapes=self.shapes[large],
                       offsets=self.offsets[large])


class MappedFile:
    """The bytes of a cache file, mapped read-only; sent to another process, it is mapped there and not copied.

    While any process has a file mapped, it holds a shared lock on it, which keeps `_remove_stale` from removing it:
    a worker may have to map it still, and on a network file system a removed file ends those who read it.
    """

    def __init__(self, path: Path, footer: bytes):
        with open(path, "rb") as file:
            with suppress(OSError):  # some network file systems have no locks
                fcntl.flock(file, fcntl.LOCK_SH)
            self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)  # keeps the file open, and so the lock
        self.bytes = np.frombuffer(self.map, np.uint8)
        if self.bytes[-FOOTER.size:].tobytes() != footer:
            raise ValueError(f"{path} was replaced while it was being opened")
        self.path, self.footer, self.touched = path.absolute(), footer, 0

    def __getitem__(self, part: slice) -> np.ndarray:
        self.touched += part.stop - part.start
        if self.touched > RESIDENT:
            self.map.madvise(mmap.MADV_DONTNEED)  # the system's page cache has them still, for all processes
            self.touched = 0
        return self.bytes[part]

    def __reduce__(self):
        return MappedFile, (self.path, self.footer)


def open_pictures(
    folder: Path,  # searched recursively
    cache_dir: Path | None = None,  # where the cache file is kept; None decodes everything into memory
) -> Pictures:
    """All pictures of a folder, from its cache, which is built if there is none that can be used.

    Any number of processes may call this at once: one builds, with a progress bar, and the others wait for it.

    Raises:
        UserError: where the folder is missing or holds no picture file, where its pictures change while they are
            read, or where the cache cannot be written.
    """
    listing = _list_files(folder)
    if cache_dir is None:
        memory = io.BytesIO()
        _write(memory, folder, listing, bar=_is_first())
        pixels = np.frombuffer(memory.getbuffer().toreadonly(), np.uint8)
        return _parse(pixels, pixels)
    place = _hash(str(folder.resolve()))
    path = cache_dir / f"{place}-{_hash([FORMAT, listing])}.luminance"
    with _explained(folder, cache_dir):
        cache_dir.mkdir(parents=True, exist_ok=True)
        if path.name in os.listdir(cache_dir):  # not path.exists(), whose "no" NFS would repeat for a while
            with suppress(FileNotFoundError, ValueError):
                return _load(path, folder)  # needs no lock, nor a folder that can be written into
        with _alone(cache_dir / f"{place}.lock", folder):
            try:
                return _load(path, folder)
            except FileNotFoundError:
                pass
            except ValueError as error:
                print(f"note: the cache {path} is built again: {error}", file=sys.stderr, flush=True)
            write_whole(path, lambda file: _build(file, folder, listing))
            _remove_stale(cache_dir, place, path)
            return _load(path, folder)


def _list_files(folder: Path) -> Listing:
    """The picture files in `folder` and below it, told by suffix, in the order of their paths.

    Raises UserError where the folder is missing or cannot be searched, or holds none.
    """
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}; give one with training pictures by --train_dir "
                        "(python -m utils.download Waterloo says where those of the paper are)")
    listing = {}
    for path in sorted(path for path in _files(folder) if is_picture_name(path.name)):
        try:
            status = path.stat()
        except FileNotFoundError:  # a link to nothing, or just removed
            continue
        except OSError as error:
            raise UserError(f"cannot look at the picture {path} ({first_line(error)})") from error
        if stat.S_ISREG(status.st_mode):
            listing[str(path.relative_to(folder))] = status.st_size, status.st_mtime_ns
    if not listing:
        raise UserError(f"no picture ({', '.join(SUFFIXES)}) in {folder} or below it")
    return listing


def _files(folder: Path) -> Iterator[Path]:
    """All files in `folder` and below it, also where links to other folders lead, but not in circles."""
    def refuse(error: OSError):
        raise UserError(f"cannot search {error.filename} for pictures ({first_line(error)})") from error

    def identity(path: str) -> tuple[int, int]:
        status = os.stat(path)
        return status.st_dev, status.st_ino

    above = {str(folder): {identity(folder)}}  # of each folder: itself and those that led there
    for place, folders, names in os.walk(folder, followlinks=True, onerror=refuse):
        passed = above.pop(place)
        for name in list(folders):
            if (found := identity(path := os.path.join(place, name))) in passed:
                folders.remove(name)
            else:
                above[path] = {*passed, found}
        yield from (Path(place, name) for name in names)


def _build(file: BinaryIO, folder: Path, listing: Listing) -> None:
    """Write a cache file, if it can be true to its name."""
    _write(file, folder, listing, bar=True)
    if _list_files(folder) != listing:
        raise UserError(f"the pictures in {folder} changed while they were being read; start again when nothing "
                        "writes there any more, or use --no_cache")


def _write(file: BinaryIO, folder: Path, listing: Listing, bar: bool) -> None:
    """Decode all pictures into `file`, with no more than a few of them in memory."""
    names, shapes, unreadable, checksum = [], [], [], 0
    with (tqdm(listing, "reading pictures", leave=False, unit=" pictures", disable=None if bar else True) as watched,
          closing(_decoded(folder, listing)) as decoded):
        for name, picture in zip(watched, decoded, strict=True):
            if picture is None:
                unreadable.append(name)
                continue
            names.append(name)
            shapes.append(picture.shape)
            checksum = zlib.crc32(picture, checksum)
            file.write(picture)
    index = json.dumps({"folder": str(folder.resolve()), "format": FORMAT, "names": names, "shapes": shapes,
                        "unreadable": unreadable}).encode()
    checked = index + FOOTER.pack(MAGIC, len(index), 0)[:-UNCHECKED]
    file.write(index + FOOTER.pack(MAGIC, len(index), zlib.crc32(checked, checksum)))


def _decoded(folder: Path, names: Listing) -> Iterator[np.ndarray | None]:
    """The luminance of each picture, by a few threads that are a few pictures ahead."""
    with ThreadPoolExecutor(THREADS) as pool:
        ahead = deque()
        for name in names:
            ahead.append(pool.submit(_luminance, folder / name))
            if len(ahead) > 2 * THREADS:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


def _luminance(path: Path) -> np.ndarray | None:
    """(H, W) uint8; None for a file that cannot be read."""
    try:
        return read_picture(path)[0]
    except UserError:
        return None


def _load(path: Path, folder: Path) -> Pictures:
    """The pictures of a finished cache file; raises ValueError, saying why, where it cannot be used."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        left, checksum = size - UNCHECKED, 0
        while left > 0 and (block := file.read(min(left, 2**24))):
            left, checksum = left - len(block), zlib.crc32(block, checksum)
        file.seek(max(0, size - FOOTER.size))
        footer = file.read()
    if len(footer) != FOOTER.size or FOOTER.unpack(footer)[::2] != (MAGIC, checksum):
        raise ValueError("it is damaged")
    mapped = MappedFile(path, footer)
    pictures = _parse(mapped.bytes, mapped)
    # It may have been for want of permission or memory that a picture could not be read; few are so.
    if any(_luminance(folder / name) is not None for name in pictures.unreadable):
        raise ValueError("pictures that could not be read can be read now")
    return pictures


def _parse(content: np.ndarray, pixels: "np.ndarray | MappedFile") -> Pictures:
    length = FOOTER.unpack(content[-FOOTER.size:])[1]
    index = json.loads(content[-FOOTER.size - length:-FOOTER.size].tobytes())
    shapes = np.array(index["shapes"], np.int64).reshape(-1, 2)
    areas = shapes.prod(1)
    return Pictures(index["names"], shapes, areas.cumsum() - areas, index["unreadable"], pixels)


def _remove_stale(cache_dir: Path, place: str, keep: Path) -> None:
    """Remove what else there is of a folder, left by a killed process or of a former state, unless it is in use."""
    for path in cache_dir.glob(f"*{place}-*"):
        if path != keep:
            with suppress(OSError), open(path, "r+b") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()


@contextmanager
def _alone(lock_path: Path, folder: Path) -> Iterator[None]:
    """Hold the lock of a folder's cache, which the operating system takes from a process that ends however it ends."""
    lock = FileLock(lock_path)
    try:
        held = lock.acquire(timeout=5)
    except Timeout:
        if _is_first():
            print(f"note: waiting for another process that is reading {folder}", file=sys.stderr, flush=True)
        held = lock.acquire()
    with held:
        yield


@contextmanager
def _explained(folder: Path, cache_dir: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, UserError) as error:
        cause = error if isinstance(error, OSError) else error.__cause__
        if not isinstance(cause, OSError):
            raise
        reason = "it is a file" if isinstance(cause, FileExistsError) else first_line(cause)
        raise UserError(f"cannot keep a cache of the pictures of {folder} in {cache_dir} ({reason}); choose another "
                        "--cache_dir, or --no_cache to read them into memory at each start") from error


def _is_first() -> bool:
    """Whether this process speaks for all that `torch.distributed.run` started."""
    return os.environ.get("RANK", "0") == "0"


def _hash(thing: object) -> str:
    return hashlib.sha256(json.dumps(thing).encode()).hexdigest()[:12]
