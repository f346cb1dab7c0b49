"""Where the pictures of the test sets come from: their homes, or a mirror."""
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from utils.data.images import is_picture_name
from utils.download.fetch import MEMBER_LIMIT, NotThere, archive_pictures, fetch
from utils.errors import UserError, first_line
from utils.files import make_folder

ARCHIVES = (".zip", ".tar", ".tgz", ".tar.gz")

Offer = tuple[str, str, bytes]  # where a picture comes from, for messages; its file name; its content


@dataclass(frozen=True)
class Home:
    """Where a set, or the originals that its pictures are cut from, is published."""

    address: str  # of an archive; or of single files, with {file} or {stem} for their names
    page: str  # to look at should the address have moved
    shifts: range = range(1)  # by how many pixels, either way, the set's pictures may lie off the originals' centres

    @property
    def archive(self) -> str | None:
        return None if "{" in self.address else self.address.rpartition("/")[2]


# Written from memory and never tried: what comes from there is believed for its checksums alone.
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
    """Pictures that may be, or may hold, those wanted; one after the other, from the likeliest place on.

    Raises UserError, NotThere among them, where a place fails.
    """
    home = HOMES[name]
    archives = [f"{name}.zip"] + [home.archive] * bool(home.archive)
    if source is None:
        yield from _web_archive(home.address, cache) if home.archive else _web_files(home.address, files, cache)
    elif "://" not in source:
        yield from _local(Path(source), name, archives)
    elif source.lower().endswith(ARCHIVES):
        yield from _web_archive(source, cache)
    else:
        base = source.rstrip("/")
        for archive in archives:
            try:
                yield from _web_archive(f"{base}/{archive}", cache)
            except NotThere:
                continue
        yield from _web_files(f"{base}/{name}/{{file}}", files, cache)


def _web_files(address: str, files: list[str], cache: Path) -> Iterator[Offer]:
    absent = []
    for file in files:
        url = address.replace("{file}", quote(file)).replace("{stem}", quote(Path(file).stem))
        try:
            path = _fetched(url, cache, MEMBER_LIMIT)
        except NotThere:
            absent.append(url)
            continue
        content = path.read_bytes()
        path.unlink()  # whatever it is worth: the next run must not find it again
        yield url, file, content
    if absent:
        raise NotThere(f"{absent[0]} is not there" + (f", nor are {len(absent) - 1} more" if absent[1:] else ""))


def _web_archive(url: str, cache: Path) -> Iterator[Offer]:
    path = _fetched(url, cache)
    try:
        yield from _archive(path, url)
    except UserError:
        path.unlink()  # damaged; the next run must fetch it anew
        raise


def _fetched(url: str, cache: Path, *limit: int) -> Path:
    make_folder(cache, "--data_dir")
    path = cache / f"{hashlib.sha256(url.encode()).hexdigest()[:8]}-{url.rpartition('/')[2][-80:]}"
    if not path.exists():
        fetch(url, path, *limit)
    return path


def _local(source: Path, name: str, archives: list[str]) -> Iterator[Offer]:
    if source.is_file():
        yield from _archive(source, str(source))
        return
    folder, archives = source / name, [source / archive for archive in archives if (source / archive).is_file()]
    if not folder.is_dir() and not archives:
        raise UserError(f"{source} is no archive, and no folder in which there is {name} or {name}.zip")
    for path in sorted(folder.rglob("*")):
        if is_picture_name(path.name) and path.is_file() and path.stat().st_size <= MEMBER_LIMIT:
            try:
                content = path.read_bytes()
            except OSError as error:
                raise UserError(f"cannot read {path}: {first_line(error)}") from error
            yield str(path), path.name, content
    for archive in archives:
        yield from _archive(archive, str(archive))


def _archive(path: Path, label: str) -> Iterator[Offer]:
    for member, content in archive_pictures(path, label):
        yield f"{member!r} in {label}", member.rpartition("/")[2], content
