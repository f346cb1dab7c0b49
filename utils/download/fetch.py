"""Fetching over HTTP, such that an interrupted transfer goes on, and reading pictures out of archives, safely."""
import http.client
import json
import os
import re
import tarfile
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from urllib.error import HTTPError
from urllib.parse import unquote
from urllib.request import Request, urlopen

from tqdm import tqdm

from utils.data.images import is_picture_name
from utils.errors import UserError, first_line
from utils.files import write_whole

ATTEMPTS = 4  # in a row that bring nothing
PAUSE = 1.0  # seconds before the second attempt, doubled for each further one
TIMEOUT = 30.0  # seconds without an answer or a byte
CHUNK = 1 << 18
DOWNLOAD_LIMIT = 4 << 30  # bytes; DIV2K's originals are 0.45 GB
MEMBER_LIMIT = 64 << 20  # bytes of one picture in an archive
ARCHIVE_LIMIT = 8 << 30  # bytes of an archive's members together, unpacked


class NotThere(UserError):
    """The server answers, and has no such file."""


class Dropped(Exception):
    """A transfer that ended before its end, for a reason that may pass."""


def fetch(url: str, path: Path, limit: int = DOWNLOAD_LIMIT) -> None:
    """Fetch `url` into the file `path`, whole or not at all.

    What has come of an interrupted transfer stays in `path`.partial, beside what identifies it (ETag or date, and
    length), and the next call goes on from there, if the server still has that very file and can send parts of it.

    Raises:
        NotThere: where the server says that there is no such file.
        UserError: where it cannot be reached, refuses, keeps breaking off, or sends more than `limit` bytes; or where
            the disk takes no more.
    """
    partial = path.with_name(path.name + ".partial")
    failures, most = 0, _size(partial)
    while True:
        try:
            _transfer(url, partial, limit)
            break
        except Dropped as error:
            failures = 1 if _size(partial) > most else failures + 1
            most = max(most, _size(partial))
            if failures == ATTEMPTS:
                kept = _size(partial) if any(_read_note(partial).values()) else 0
                after = f"; run the same command again: it goes on after {kept:,} bytes" if kept else ""
                raise UserError(f"cannot fetch {url} ({error}){after}") from error
            time.sleep(PAUSE * 2**(failures - 1))
    with _disk(path):
        os.replace(partial, path)
        _note(partial).unlink(missing_ok=True)


def _transfer(url: str, partial: Path, limit: int) -> None:
    have, known = _size(partial), _read_note(partial)
    if have and have == known.get("length"):
        return
    headers = {"User-Agent": "idm-download", "Accept-Encoding": "identity"}
    resumable = have and (known.get("validator") or known.get("length"))
    if resumable:
        headers["Range"] = f"bytes={have}-"
        if known.get("validator"):
            headers["If-Range"] = known["validator"]
    with _open(Request(url, headers=headers), partial) as response:
        if response.status == 206:
            if not resumable or not _goes_on(response.headers, have, known):
                _forget(partial)
                raise Dropped("the file changed on the server meanwhile, or its parts do not fit together")
            length = known.get("length")
        else:
            have, length = 0, _number(response.headers.get("Content-Length", ""))
            known = {"validator": _validator(response.headers), "length": length}
        if (length or 0) > limit:
            raise UserError(f"{url} is larger than expected ({length:,} bytes), and was not fetched")
        with _disk(partial):
            _receive(response, partial, have, known, limit)
    if length is not None and _size(partial) != length:
        raise Dropped(f"the connection ended after {_size(partial):,} of {length:,} bytes")


def _receive(response: http.client.HTTPResponse, partial: Path, have: int, known: dict, limit: int) -> None:
    bar = tqdm(total=known.get("length"), initial=have, unit="B", unit_scale=True, unit_divisor=1000, leave=False,
               disable=None, desc=unquote(response.url.rpartition("/")[2])[-30:])
    with bar, open(partial, "ab" if have else "wb") as file:
        if not have:
            write_whole(_note(partial), json.dumps(known).encode())  # after the file was emptied: it must never lie
        for chunk in _chunks(response):
            have += len(chunk)
            if have > limit:
                _forget(partial)
                raise UserError(f"{response.url} is larger than expected (over {limit:,} bytes), and was given up")
            file.write(chunk)
            bar.update(len(chunk))


def _chunks(response: http.client.HTTPResponse) -> Iterator[bytes]:
    try:
        while chunk := response.read1(CHUNK):
            yield chunk
    except (OSError, http.client.HTTPException) as error:
        raise Dropped(f"the connection broke: {first_line(error)}") from error


def _open(request: Request, partial: Path) -> http.client.HTTPResponse:
    try:
        return urlopen(request, timeout=TIMEOUT)
    except HTTPError as error:
        error.close()
        if error.code in (403, 404, 410):  # 403: what storage services say of files that they do not list
            raise NotThere(f"{request.full_url} is not there (HTTP {error.code})") from error
        if error.code == 416:  # what is kept reaches beyond the file's end
            _forget(partial)
        if error.code in (408, 416, 429) or error.code >= 500:
            raise Dropped(f"HTTP {error.code}: {error.reason}") from error
        raise UserError(f"cannot fetch {request.full_url}: the server says {error.code} ({error.reason})") from error
    except (ValueError, http.client.InvalidURL) as error:
        raise UserError(f"{request.full_url} is not an address ({first_line(error)})") from error
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)  # URLError wraps the error that tells more
        raise Dropped(f"no connection: {first_line(reason) if isinstance(reason, Exception) else reason}") from error


def _validator(headers: http.client.HTTPMessage) -> str | None:
    """What If-Range takes: a strong ETag, else the date (RFC 9110, section 13.1.5)."""
    tag = headers.get("ETag", "")
    return tag if tag.startswith('"') else headers.get("Last-Modified")


def _goes_on(headers: http.client.HTTPMessage, have: int, known: dict) -> bool:
    """Whether an answer to a Range request continues the very file that `known` describes."""
    extent = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", headers.get("Content-Range", "").strip())
    return (extent is not None and int(extent[1]) == have
            and _number(extent[2]) in (None, known.get("length"))
            and _validator(headers) in (None, known.get("validator")))  # a date need not be repeated


def _number(text: str) -> int | None:
    return int(text) if re.fullmatch(r"\d{1,18}", text) else None


def _note(partial: Path) -> Path:
    return partial.with_name(partial.name + ".json")


def _read_note(partial: Path) -> dict:
    try:
        note = json.loads(_note(partial).read_text())
    except (OSError, ValueError):
        return {}
    return note if isinstance(note, dict) else {}


def _forget(partial: Path) -> None:
    partial.unlink(missing_ok=True)
    _note(partial).unlink(missing_ok=True)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


@contextmanager
def _disk(path: Path) -> Iterator[None]:
    """What the disk refuses is a UserError; the network's faults are no OSError by then."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {path} ({first_line(error)}); see that the disk has room and that the folder "
                        "can be written, then run the same command again") from error


# --- archives ------------------------------------------------------------------------------------------------------

def archive_pictures(
    path: Path,
    label: str,  # what the archive is called in messages
) -> Iterator[tuple[str, bytes]]:
    """(name, content) of each file in a zip or tar archive whose name is a picture's.

    Nothing is unpacked onto the disk, no link is followed, and the names are for messages alone: they may be absolute
    or climb out of their folder.

    Raises UserError where it is no archive, or damaged, or unpacks to more than any archive of pictures should.
    """
    try:
        if zipfile.is_zipfile(path):
            yield from _zip_files(path, label)
        else:
            yield from _tar_files(path, label)
    except UserError:
        raise
    except Exception as error:  # what a damaged archive can raise is not written down anywhere
        with open(path, "rb") as file:
            start = file.read(20)
        raise UserError(f"{label} is no zip or tar archive, or is damaged ({first_line(error)}; it starts with "
                        f"{start!r})") from error


def _zip_files(path: Path, label: str) -> Iterator[tuple[str, bytes]]:
    total = 0
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            if member.is_dir() or not _wanted(member.filename):
                continue  # a link's content is but a path, which no checksum will fit
            total += _allowed(label, member.filename, member.file_size, total, MEMBER_LIMIT)
            with archive.open(member) as file:
                # One byte more than it claims: unbounded, zipfile would unpack what a lying header hides.
                yield member.filename, file.read(member.file_size + 1)


def _tar_files(path: Path, label: str) -> Iterator[tuple[str, bytes]]:
    total = 0
    with tarfile.open(path, "r:*") as archive:
        for member in archive:
            wanted = member.isreg() and _wanted(member.name)
            total += _allowed(label, member.name, member.size, total, MEMBER_LIMIT if wanted else ARCHIVE_LIMIT)
            if wanted:
                yield member.name, archive.extractfile(member).read()


def _wanted(name: str) -> bool:
    return is_picture_name(PurePosixPath(name).name)


def _allowed(label: str, name: str, size: int, total: int, limit: int) -> int:
    if size > limit or total + size > ARCHIVE_LIMIT:
        raise UserError(f"{label} was not unpacked: {name!r} would take {size:,} bytes, and the whole archive "
                        f"{total + size:,} or more, which no archive of test pictures should")
    return size
