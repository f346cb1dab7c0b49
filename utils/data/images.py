"""Pictures in and out: reading into luminance and colour, writing reconstructions, padding (paper, section 4.1)."""
import os
import re
import stat
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np

from utils.errors import UserError, first_line
from utils.files import write_atomic

if TYPE_CHECKING:
    from torch import Tensor

SUFFIXES = (".png", ".tif", ".tiff", ".bmp", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".jp2", ".pgm", ".ppm", ".pnm",
            ".pbm")
# Of a file that starts so, what a whole one also holds: some decoders fill in what a truncated file lacks.
_ENDS = {b"\x89PNG": b"IEND", b"\xff\xd8\xff": b"\xff\xd9"}
_TIFF = (b"II*\0", b"MM\0*")

# OpenCV's own complaints would stand beside the one sentence that the user gets.
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)


def is_picture_name(name: str) -> bool:
    """Whether a file's name says that it holds a picture; hidden files, such as macOS's ._a.png, do not."""
    return name.lower().endswith(SUFFIXES) and not name.startswith(".")


def list_pictures(folder: str | os.PathLike) -> list[Path]:
    """The picture files in `folder`, told by suffix and sorted by name; hidden files and all else are ignored.

    A link to a file that is not there is listed as well, that it be missed by whoever reads it.

    Raises UserError where the folder cannot be listed, or a picture's name is not valid UTF-8.
    """
    try:
        paths = sorted(path for path in Path(folder).iterdir()
                       if is_picture_name(path.name) and (path.is_file() or not path.exists()))  # a link to nothing
    except OSError as error:
        raise UserError(f"cannot list {folder}: {first_line(error)}") from error
    for path in paths:
        try:
            path.name.encode()
        except UnicodeEncodeError as error:
            shown = os.fsencode(path.name).decode(errors="backslashreplace")
            raise UserError(f"the name of the picture {shown} in {folder} is not valid UTF-8; rename it") from error
    return paths


def find_pictures(folder: Path) -> dict[str, tuple[int, ...]]:
    """Return the picture files in `folder` and below it, by their paths relative to it, sorted.

    With each stands what changes when the file does: its size in bytes and its date in ns, by which people tell files
    apart; then the time of the last change to its status in ns, and its inode. Links to folders are followed, but each
    folder is searched once.

    Raises UserError where a folder is missing or cannot be searched, or there is no picture.
    """
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}; give one with training pictures by --train_dir "
                        "(python -m utils.download Waterloo says where those of the paper are)")

    def refuse(error: OSError):
        raise UserError(f"cannot search {error.filename} for pictures ({first_line(error)})") from error

    found, searched = {}, set()
    for parent, folders, names in os.walk(folder, followlinks=True, onerror=refuse):
        folders.sort()  # always the same of two links to one folder is followed
        if os.path.realpath(parent) in searched:
            folders.clear()
            continue
        searched.add(os.path.realpath(parent))
        for path in (Path(parent, name) for name in names if is_picture_name(name)):
            try:
                status = path.stat()
            except FileNotFoundError:  # a link to nothing, or just removed
                continue
            except OSError as error:
                raise UserError(f"cannot look at the picture {path} ({first_line(error)})") from error
            if stat.S_ISREG(status.st_mode):
                found[path.relative_to(folder)] = (status.st_size, status.st_mtime_ns, status.st_ctime_ns,
                                                   status.st_ino)
    if not found:
        raise UserError(f"no picture ({', '.join(SUFFIXES)}) in {folder} or below it")
    return {str(path): found[path] for path in sorted(found)}


def read_picture(path: str | os.PathLike) -> tuple[np.ndarray, np.ndarray | None]:
    """Read a picture of any kind OpenCV knows, with 8 or 16 bits a sample; alpha is dropped, 16 bits become 8.

    Returns luminance, uint8 (H, W), and YCrCb, uint8 (H, W, 3), or None for a grey picture.
    Raises UserError where the file is missing, no picture, or cut short, or a TIFF of 8 bits that is transparent.
    """
    try:
        data = np.fromfile(path, np.uint8)  # not cv2.imread, which cannot open every non-ASCII path
    except OSError as error:
        raise UserError(f"cannot read {path}: {first_line(error)}") from error
    pixels = _decode(data)
    if pixels is None:
        raise UserError(f"cannot read {path}: it is damaged or not a picture")
    if pixels.ndim == 3 and data[:4].tobytes() in _TIFF and _transparent(cv2.imdecode(data, cv2.IMREAD_UNCHANGED)):
        raise UserError(f"cannot read {path}: OpenCV would darken it where it is transparent; save it without alpha")
    if pixels.dtype == np.uint16:
        pixels = ((pixels.astype(np.uint32) + 128) // 257).astype(np.uint8)  # 65535 = 255 * 257, rounded
    if pixels.dtype != np.uint8:
        raise UserError(f"cannot read {path}: its samples are {pixels.dtype}; save it with 8 or 16 bits")
    if pixels.ndim == 2:
        return pixels, None
    ycrcb = cv2.cvtColor(pixels, cv2.COLOR_BGR2YCrCb)
    return ycrcb[..., 0].copy(), ycrcb


def _transparent(pixels: np.ndarray) -> bool:
    return pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 4 and bool((pixels[..., 3] < 255).any())


def in_8_bits(luminance: np.ndarray) -> np.ndarray:
    """Luminance in [0, 255] as a file holds it, uint8: rounded and clipped; what is not a number becomes black."""
    return np.nan_to_num(luminance, nan=0.0).round().clip(0, 255).astype(np.uint8)


def write_reconstruction(
    path: str | os.PathLike,  # the PNG file to write, whole or not at all
    luminance: np.ndarray,  # float (H, W) in [0, 255]
    ycrcb: np.ndarray | None = None,  # uint8 (H, W, 3), the original that lends Cr and Cb; None for a grey picture
) -> None:
    """Write a reconstruction as an 8-bit PNG; raises UserError where that is not possible."""
    pixels = in_8_bits(luminance)
    if ycrcb is not None:
        pixels = cv2.cvtColor(np.dstack([pixels, ycrcb[..., 1:]]), cv2.COLOR_YCrCb2BGR)
    write_atomic(path, cv2.imencode(".png", pixels)[1].tobytes())


def remove_former(folder: str | os.PathLike, names: Collection[str]) -> None:
    """Remove the reconstructions of pictures of these names that former runs left in `folder`.

    Raises UserError where that is not possible.
    """
    score = r"(?:-?\d+\.\d+|-?inf|nan)"
    result = re.compile(rf"(.+)_PSNR_{score}_SSIM_{score}\.png", re.DOTALL)
    try:
        for path in Path(folder).iterdir():
            if (found := result.fullmatch(path.name)) and found[1] in names:
                path.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"cannot remove a former result from {folder}: {first_line(error)}") from error


def pad_to_multiple(x: "Tensor", multiple: int) -> "Tensor":
    """Pad x (..., H, W) with zeros at the bottom and right, until H and W are multiples of `multiple`."""
    from torch.nn.functional import pad  # here, since it takes seconds that most of this file's users need not wait for

    height, width = x.shape[-2:]
    return pad(x, (0, -width % multiple, 0, -height % multiple))


def _decode(data: np.ndarray) -> np.ndarray | None:
    """Grey (H, W) or BGR (H, W, 3) pixels of any depth, turned as EXIF says; None where they cannot be decoded."""
    content = data.tobytes()
    if any(content.startswith(start) and end not in content for start, end in _ENDS.items()):
        return None
    try:
        return cv2.imdecode(data, cv2.IMREAD_ANYCOLOR | cv2.IMREAD_ANYDEPTH)
    except cv2.error:  # an empty file, or more pixels than OpenCV takes
        return None
