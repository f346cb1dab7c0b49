"""Pictures in and out: reading into luminance and colour, writing reconstructions, padding (paper, section 4.1).

OpenCV decodes. What it would decode wrongly, or although it is damaged, is found out with Pillow and simplejpeg.
"""
import hashlib
import io
import os
import re
import stat
import warnings
import zlib
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

from utils.data.lzw import lzw_length
from utils.errors import UserError, first_line
from utils.files import write_atomic

if TYPE_CHECKING:
    from torch import Tensor

SUFFIXES = (".png", ".tif", ".tiff", ".bmp", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".jp2", ".pgm", ".ppm", ".pnm",
            ".pbm")
_SCORE = r"(?:-?\d+\.\d+|-?inf|nan)"
RESULT_NAME = re.compile(rf"(.+)_PSNR_{_SCORE}_SSIM_{_SCORE}", re.DOTALL)  # of what test.py writes, without suffix
LONGEST_NAME = 255 - len("_PSNR_-100.00_SSIM_-0.0000.png")  # bytes; file systems take names of up to 255
MAX_PIXELS = 1 << 26  # of a picture: 8192 x 8192
_NOT_UTF8, _CONTROL = re.compile("[\ud800-\udfff]"), re.compile("[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")

# The libraries' own complaints would stand beside the one sentence that the user gets.
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
warnings.filterwarnings("ignore", module=r"PIL\.")


def is_picture_name(name: str) -> bool:
    """Return whether a file's name says that it is a picture; hidden files, such as macOS's ._a.png, do not."""
    return name.lower().endswith(SUFFIXES) and not name.startswith(".")


def list_pictures(folder: str | os.PathLike) -> list[Path]:
    """Return the picture files in `folder`, told by suffix and sorted by name; hidden files and all else are ignored.

    A link to a file that is not there is listed as well, that it be missed by whoever reads it.

    Raises UserError where the folder cannot be listed, or a picture's name cannot be printed.
    """
    try:
        paths = sorted(path for path in Path(folder).iterdir()
                       if is_picture_name(path.name) and (path.is_file() or not path.exists()))  # a link to nothing
    except OSError as error:
        raise UserError(f"cannot list {folder}: {first_line(error)}") from error
    for path in paths:
        for wrong, what in ((_NOT_UTF8, "is not valid UTF-8"), (_CONTROL, "has control characters")):
            if wrong.search(path.name):
                shown = wrong.sub(lambda found: ascii(os.fsencode(found[0]))[2:-1], path.name)
                raise UserError(f"the name of the picture {shown} in {folder} {what}; rename it")
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

    Raises UserError where the file is missing, no picture, damaged as far as its format can tell (uncompressed files
    have no checksum, and LZW's lengths tell a part), of more than MAX_PIXELS, or of a kind of which the right values
    are not known.
    """
    try:
        content = Path(path).read_bytes()  # not cv2.imread, which cannot open every non-ASCII path
    except OSError as error:
        raise UserError(f"cannot read {path}: {first_line(error)}") from error
    try:
        pixels = _decode(content)
    except _Unsuitable as error:
        raise UserError(f"cannot read {path}: {error}") from error
    except Exception as error:  # what a damaged file can raise is not written down anywhere
        raise UserError(f"cannot read {path}: it is damaged or not a picture ({first_line(error)})") from error
    if pixels.ndim == 2:
        return pixels, None
    ycrcb = cv2.cvtColor(pixels, cv2.COLOR_BGR2YCrCb)
    return ycrcb[..., 0].copy(), ycrcb


class _Unsuitable(Exception):
    """A picture that is intact, and yet cannot be read."""


def _decode(content: bytes) -> np.ndarray:
    """Return grey (H, W) or BGR (H, W, 3) pixels, uint8, turned as EXIF says."""
    white_is_zero = _check(content)
    data = np.frombuffer(content, np.uint8)
    pixels = cv2.imdecode(data, cv2.IMREAD_ANYCOLOR | cv2.IMREAD_ANYDEPTH)
    if pixels is None:
        raise ValueError("OpenCV cannot decode it")
    if pixels.dtype == np.uint16:
        pixels = ~pixels if white_is_zero else pixels
        if 0 < (most := pixels.max()) < 4096:
            raise _Unsuitable(f"its 16-bit samples reach only {most}; scale them to 65535, or save it with 8 bits")
        pixels = ((pixels.astype(np.uint32) + 128) // 257).astype(np.uint8)  # 65535 = 255 * 257, rounded
    if pixels.dtype != np.uint8:
        raise _Unsuitable(f"its samples are {pixels.dtype}; save it with 8 or 16 bits")
    return pixels


def _check(content: bytes) -> bool:
    """Raise an exception for what OpenCV would accept and should not; return whether the values of a TIFF are inverted.

    OpenCV inverts those with 8 bits itself.
    """
    try:
        picture = Image.open(io.BytesIO(content))  # reads the header alone
        too_large = picture.width * picture.height > MAX_PIXELS
    except UnidentifiedImageError as error:  # as kinds of TIFF that OpenCV alone knows, some of them wrongly
        raise _Unsuitable("it is not a picture, or of a kind that cannot be checked; save it as PNG") from error
    except Image.DecompressionBombError:
        too_large = True
    if too_large:
        raise _Unsuitable(f"it has more than {MAX_PIXELS:,} pixels")
    with picture:
        if picture.format in ("JPEG", "MPO"):
            simplejpeg.decode_jpeg(content, "GRAY", strict=True)  # what libjpeg warns of is an error
        if picture.format == "PNG" and b"IEND" not in content:
            raise ValueError("it is cut short")
        if content[:2] in (b"P2", b"P3", b"P5", b"P6"):
            white = re.sub(rb"#[^\n]*", b"", content[:1000]).split()[3]
            if white not in (b"255", b"65535"):
                raise _Unsuitable(f"its white is {white.decode()}, not 255 or 65535; save it with 8 or 16 bits")
        if picture.format != "TIFF":
            return False
        _check_tiff(picture, content)
        return picture.tag_v2.get(262) == 0


def _check_tiff(picture: Image.Image, content: bytes) -> None:
    tags, compression = picture.tag_v2, picture.tag_v2.get(259)
    lengths = _lzw_lengths(picture) if compression == 5 else ()
    for start, length in zip(tags.get(273) or tags.get(324), tags.get(279) or tags.get(325), strict=True):
        strip = content[start:start + length]  # or tile
        if compression in (8, 32946):  # deflate, whose checksums libtiff does not look at
            stream = zlib.decompressobj()
            stream.decompress(strip, 8 * MAX_PIXELS)
            if not stream.eof:
                raise ValueError("a strip of it is cut short")
        elif lengths and strip[:1] != b"\0" and lzw_length(strip) not in lengths:  # 0: the bits' order before TIFF 5
            raise ValueError("a strip of it has another length than its picture")
        elif compression == 7:  # JPEG, which may have its tables elsewhere
            tables = tags.get(347, b"")
            simplejpeg.decode_jpeg(tables[:-2] + strip[2:] if tables else strip, "GRAY", strict=True)
    picture.load()  # raises what libtiff calls an error, and OpenCV passes over
    depths = tags.get(258, ())
    if picture.mode == "LAB" or (tags.get(284) == 2 and 16 in depths):
        raise _Unsuitable("OpenCV would read it wrongly, as CIELAB or 16-bit planes; save it as PNG")
    if picture.mode == "RGBA" and 8 in depths and picture.getextrema()[3][0] < 255:
        raise _Unsuitable("OpenCV would darken it where it is transparent; save it without alpha")


def _lzw_lengths(picture: Image.Image) -> set[int]:
    """Return the bytes that a strip or tile of a TIFF may have: those of all its rows, or the last strip's.

    Empty where that is not known: of subsampled colours, and of bits that are stored in the other order.
    """
    tags = picture.tag_v2
    if tags.get(262) == 6 or tags.get(266, 1) != 1:
        return set()
    width, rows = tags.get(322, picture.width), tags.get(323) or min(tags.get(278, picture.height), picture.height)
    samples = 1 if tags.get(284) == 2 else tags.get(277, 1)
    row = (width * samples * tags.get(258, (1,))[0] + 7) // 8
    return {rows * row, picture.height % rows * row or rows * row}


def in_8_bits(luminance: np.ndarray) -> np.ndarray:
    """Return luminance in [0, 255] as in a file, uint8: rounded and clipped; what is not a number becomes black."""
    return np.nan_to_num(luminance, nan=0.0).round().clip(0, 255).astype(np.uint8)


def write_reconstruction(
    path: str | os.PathLike,  # the PNG file, which is written atomically
    luminance: np.ndarray,  # float (H, W) in [0, 255]
    ycrcb: np.ndarray | None = None,  # uint8 (H, W, 3), the original that lends Cr and Cb; None for a grey picture
) -> None:
    """Write a reconstruction as an 8-bit PNG; raises UserError where that is not possible."""
    write_atomic(path, cv2.imencode(".png", in_colour(luminance, ycrcb))[1].tobytes())


def in_colour(luminance: np.ndarray, ycrcb: np.ndarray | None) -> np.ndarray:
    """Return a luminance, float (H, W) in [0, 255], with the Cr and Cb of another picture: uint8 (H, W) or BGR."""
    pixels = in_8_bits(luminance)
    if ycrcb is None:
        return pixels
    return cv2.cvtColor(np.dstack([pixels, ycrcb[..., 1:]]), cv2.COLOR_YCrCb2BGR)


def file_stem(name: str) -> str:
    """Return what the result picture's file name begins with: the picture's name, where need be cut, with its hash."""
    if len(name.encode()) <= LONGEST_NAME:
        return name
    mark = "~" + hashlib.sha256(name.encode()).hexdigest()[:8]
    return name.encode()[:LONGEST_NAME - len(mark)].decode(errors="ignore") + mark


def remove_former(folder: str | os.PathLike, names: Collection[str]) -> None:
    """Remove the reconstructions of pictures of these names that former runs left in `folder`.

    Raises UserError where that is not possible.
    """
    try:
        for path in Path(folder).iterdir():
            if path.suffix == ".png" and (found := RESULT_NAME.fullmatch(path.stem)) and found[1] in names:
                path.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"cannot remove a former result from {folder}: {first_line(error)}") from error


def pad_to_multiple(x: "Tensor", multiple: int) -> "Tensor":
    """Pad x (..., H, W) with zeros at the bottom and right, until H and W are multiples of `multiple`."""
    from torch.nn.functional import pad  # here, since it takes seconds that most of this file's users need not wait for

    height, width = x.shape[-2:]
    return pad(x, (0, -width % multiple, 0, -height % multiple))
