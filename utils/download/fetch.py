"""Where the pictures of the test sets come from: their homes or a mirror, fetched by pooch and read out of archives."""
import hashlib
import tarfile
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from urllib.parse import quote, unquote

import pooch
from tqdm import tqdm

from utils.data.images import is_picture_name
from utils.errors import UserError, first_line, listed
from utils.files import explained

PICTURE_LIMIT = 64 << 20  # bytes of one picture
ARCHIVE_LIMIT = 4 << 30  # bytes of an archive, and of its members together, unpacked; DIV2K's has 0.45 GB
HEADER_LIMIT = 1 << 20  # bytes of what a tar archive tells about a member, such as a long name
TIMEOUT = 30  # seconds without an answer or a byte
SLOWEST = 50_000  # bytes a second, at which a file of the largest size allowed must come
RETRIES = 3  # in a row that bring nothing
ARCHIVES = (".zip", ".tar", ".tgz", ".tar.gz")
pooch.get_logger().setLevel("ERROR")  # the command line says what is to be said

Offer = tuple[str, str, bytes]  # where a picture comes from, for messages; its file name; its content


class NotThere(UserError):
    """The server answers, and has no such file."""


@dataclass(frozen=True)
class Home:
    """Where a set, or the originals that its pictures are cut from, is published."""

    address: str  # of an archive; or of single files, with {file} or {stem} for their names
    page: str  # to look at should the address have moved
    shifts: range = range(1)  # by how many pixels, either way, the set's pictures may lie off the originals' centres

    @property
    def archive(self) -> str | None:
        return None if "{" in self.address else self.address.rpartition("/")[2]


# Written from memory and never tried: what comes from there is trusted for its checksums alone.
# CBSD68's pictures have the 8x8 grid of Berkeley's JPEGs, starting at 0, 0.
HOMES = {
    "Set11": Home("https://raw.githubusercontent.com/jianzhangcs/ISTA-Net-PyTorch/master/data/Set11/{file}",
                  "https://github.com/jianzhangcs/ISTA-Net-PyTorch"),
    "CBSD68": Home("https://www2.eecs.berkeley.edu/Research/Projects/CS/vision/bsds/BSDS300-images.tgz",
                   "https://www2.eecs.berkeley.edu/Research/Projects/CS/vision/bsds/", shifts=range(-16, 17, 8)),
    "Urban100": Home("https://raw.githubusercontent.com/jbhuang0604/SelfExSR/master/data/Urban100/image_SRF_4/"
                     "{stem}_SRF_4_HR.png", "https://github.com/jbhuang0604/SelfExSR", shifts=range(-4, 5)),
    "DIV2K": Home("https://data.vision.ee.ethz.ch/cvl/DIV2K/DIV2K_valid_HR.zip",
                  "https://data.vision.ee.ethz.ch/cvl/DIV2K/", shifts=range(-2, 3)),
}


def offers(
    name: str,  # of a set in HOMES
    files: list[str],  # those of its pictures that are wanted
    source: str | None,  # a mirror: a folder, an archive, or an http(s) address; None: the set's home
    cache: Path,  # a folder for what is being downloaded
) -> Iterator[Offer]:
    """Yield pictures that may be, or may contain, those wanted, from the likeliest address on.

    Raises UserError where an address fails or, NotThere, has nothing.
    """
    archives = [f"{name}.zip"] + [HOMES[name].archive] * bool(HOMES[name].archive)
    if source and "://" not in source:
        yield from _local(Path(source), name, archives)
        return
    base = (source or "").rstrip("/")
    addresses = [HOMES[name].address] if not source else [source] if source.lower().endswith(ARCHIVES) else [
        *(f"{base}/{archive}" for archive in archives), f"{base}/{name}/{{file}}"]
    absent = []
    for address in addresses:
        for file in files if "{" in address else [None]:
            url = address if file is None else address.format(file=quote(file), stem=quote(Path(file).stem))
            try:
                path = fetch(url, cache, PICTURE_LIMIT if file else ARCHIVE_LIMIT)
                if file is None:
                    yield from archive_pictures(path, url)
                else:
                    content = path.read_bytes()
                    path.unlink()  # whatever it is worth: the next run must not find it again
                    yield url, file, content
            except NotThere as error:
                absent.append(str(error))
            except UserError:
                (cache / _file_name(url)).unlink(missing_ok=True)  # damaged; the next run must fetch it anew
                raise
    if absent:
        raise NotThere(listed(absent, 1))


def _local(source: Path, name: str, archives: list[str]) -> Iterator[Offer]:
    there = [source / archive for archive in archives if (source / archive).is_file()]
    paths = [source] if source.is_file() else sorted((source / name).rglob("*")) + there
    if not paths:
        raise UserError(f"{source} is no archive, and no folder in which there is {name} or {name}.zip")
    for path in paths:
        if path == source or path.parent == source:
            yield from archive_pictures(path, str(path))
        elif is_picture_name(path.name) and path.is_file() and path.stat().st_size <= PICTURE_LIMIT:
            try:
                content = path.read_bytes()
            except OSError as error:
                raise UserError(f"cannot read {path}: {first_line(error)}") from error
            yield str(path), path.name, content


# --- over HTTP -----------------------------------------------------------------------------------------------------

def fetch(url: str, cache: Path, limit: int) -> Path:
    """Fetch `url` into a file of the folder `cache`, completely or not at all; returns its path.

    What came of an interrupted transfer stays in `cache`, and the next call goes on from there.

    Raises:
        NotThere: where the server says that there is no such file.
        UserError: where it cannot be reached, refuses, keeps breaking off, sends more than `limit` bytes or takes too
            long; or where the disk takes no more.
    """
    import requests  # here, since --check and mistakes need not wait for it

    name = _file_name(url)
    store = pooch.create(cache, "", registry={name: None}, urls={name: url}, retry_if_failed=RETRIES)
    kept, deadline = cache / f"{name}.partial", time.monotonic() + limit / SLOWEST
    with explained(cache / name):
        while True:
            before = _size(kept)
            try:
                requests.Request("GET", url).prepare()  # pooch would try a malformed address again
                return Path(store.fetch(name, downloader=partial(_download, kept, limit, deadline)))
            except requests.RequestException as error:
                if _size(kept) <= before:
                    after = f"; run the same command again: it goes on after {before:,} bytes" if before else ""
                    raise UserError(f"cannot fetch {url} ({_cause(error)}){after}") from error


def _download(kept: Path, limit: int, deadline: float, url: str, output_file: str, _: pooch.Pooch) -> None:
    """Download a file for pooch, from where an interrupted transfer stopped, which is in `kept`.

    Raises requests.RequestException for what another attempt may mend, else UserError, or OSError where it is the disk.
    """
    import requests
    import urllib3

    note, have = kept.with_suffix(".etag"), _size(kept)
    headers = {"User-Agent": "idm-download", "Accept-Encoding": "identity"}
    if have:  # sent in full, should the file on the server have changed
        headers |= {"Range": f"bytes={have}-", "If-Range": note.read_text()}
    with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as response:
        if response.status_code in (403, 404, 410):  # 403: what storage services say of files that they do not list
            raise NotThere(f"{url} is not there (HTTP {response.status_code})")
        if response.status_code == 416:  # what is kept reaches beyond the file's end
            note.unlink()
        elif 400 <= response.status_code < 500 and response.status_code not in (408, 429):  # too slow, too often
            raise UserError(f"cannot fetch {url} (HTTP {response.status_code}: {response.reason})")
        response.raise_for_status()
        have = have if response.status_code == 206 else 0
        length = response.headers.get("Content-Length", "")
        total = have + (int(length) if length.isdecimal() else 0)
        with open(kept, "ab" if have else "wb") as file, tqdm(
                total=total or None, initial=have, unit="B", unit_scale=True, leave=False, disable=None,
                desc=unquote(_file_name(url))[9:39]) as bar:
            if not have:
                note.write_text(_validator(response))
            try:
                while total <= limit and (chunk := response.raw.read1(1 << 18)):
                    file.write(chunk)
                    bar.update(len(chunk))
                    total = max(total, file.tell())
                    if time.monotonic() > deadline:
                        raise UserError(f"{url} is too slow, and was given up")
            except urllib3.exceptions.HTTPError as error:
                raise requests.RequestException(error) from error
    if total > limit:
        kept.unlink()
        raise UserError(f"{url} is larger than expected ({total:,} bytes or more), and was not fetched")
    kept.replace(output_file)
    note.unlink()


def _file_name(url: str) -> str:
    return f"{hashlib.sha256(url.encode()).hexdigest()[:8]}-{url.rpartition('/')[2][-80:]}"


def _validator(response) -> str:
    """Return what If-Range takes: a strong ETag, else the date (RFC 9110, section 13.1.5), else ""."""
    tag = response.headers.get("ETag", "")
    return tag if tag.startswith('"') else response.headers.get("Last-Modified", "")


def _size(kept: Path) -> int:
    """Return how many bytes there are of a file that the server can be asked to go on with."""
    note = kept.with_suffix(".etag")
    return kept.stat().st_size if kept.exists() and note.exists() and note.read_text() else 0


def _cause(error: BaseException) -> str:
    """Return in a few words what was behind all that requests and urllib3 wrap it in."""
    while error.__context__ is not None:
        error = error.__context__
    return first_line(error)


# --- archives ------------------------------------------------------------------------------------------------------

class TooLarge(Exception):
    """An archive claims to contain more than it should."""


def archive_pictures(
    path: Path,
    label: str,  # what the archive is called in messages
) -> Iterator[Offer]:
    """Yield each file in a zip or tar archive whose name is a picture's.

    Nothing is unpacked onto the disk, no link is followed, and the names are for messages alone: they may be absolute
    or climb out of their folder.

    Raises UserError where it is no archive, or damaged, or unpacks to more than any archive of pictures should.
    """
    try:
        for name, content in _zip_files(path) if zipfile.is_zipfile(path) else _tar_files(path):
            yield f"{name!r} in {label}", PurePosixPath(name).name, content
    except TooLarge as error:
        raise UserError(f"{label} was not unpacked: {error}, which no archive of test pictures should") from error
    except Exception as error:  # what a damaged archive can raise is not written down anywhere
        with open(path, "rb") as file:
            start = file.read(20)
        raise UserError(f"{label} is no zip or tar archive, or is damaged ({first_line(error)}; it starts with "
                        f"{start!r})") from error


def _zip_files(path: Path) -> Iterator[tuple[str, bytes]]:
    total = 0
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            if not member.is_dir() and is_picture_name(PurePosixPath(member.filename).name):
                total = _allow(member.filename, member.file_size, total, PICTURE_LIMIT)
                with archive.open(member) as file:
                    # One byte more than it claims: unbounded, zipfile would unpack what a lying header hides.
                    yield member.filename, file.read(member.file_size + 1)


def _tar_files(path: Path) -> Iterator[tuple[str, bytes]]:
    total = 0
    with tarfile.open(path, "r:*", tarinfo=_TarHeader) as archive:
        for member in archive:
            wanted = member.isreg() and is_picture_name(PurePosixPath(member.name).name)
            total = _allow(member.name, member.size, total, PICTURE_LIMIT if wanted else ARCHIVE_LIMIT)
            if wanted:
                yield member.name, archive.extractfile(member).read()


class _TarHeader(tarfile.TarInfo):
    """A header that is refused before tarfile reads into memory all that it claims to tell about the next member."""

    @classmethod
    def frombuf(cls, *args) -> tarfile.TarInfo:
        header = super().frombuf(*args)
        if header.type not in tarfile.REGULAR_TYPES or header.type == tarfile.GNUTYPE_SPARSE:
            _allow(header.name, header.size, 0, HEADER_LIMIT)
        return header


def _allow(name: str, size: int, total: int, limit: int) -> int:
    """Return the bytes of all members with this one; raises TooLarge where that is too much, or `size` for one."""
    if size > limit or total + size > ARCHIVE_LIMIT:
        raise TooLarge(f"{name!r} would take {size:,} bytes, and the whole archive {total + size:,} or more")
    return total + size
