"""Atomic writes, which leave a complete file or folder or the former one; locks; tables; sentences for what fails."""
import csv
import errno
import io
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from utils.errors import UserError, first_line, note

PATIENCE = 15  # seconds in which the workers of a process that was killed end as well
ABANDONED = 600  # seconds in which whoever writes a file has written some of it
FORMULA = ("=", "+", "-", "@", "\t", "\r")  # what a spreadsheet takes for one begins so


def make_folder(
    folder: Path,
    flag: str,  # the flag that chose it, for the message
) -> None:
    """Make a folder, if need be, and find out now whether files can be written into it; raises UserError if not.

    What processes that were killed left unfinished in it is removed.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, delete=False) as file:  # some cannot remove what is open
            now = os.fstat(file.fileno()).st_mtime  # by the clock of the file system
        os.unlink(file.name)
        for path in folder.glob(".*.partial"):
            with suppress(FileNotFoundError):
                if now - path.stat().st_mtime > ABANDONED:
                    _remove(path)
    except OSError as error:
        reason = "it is a file" if isinstance(error, FileExistsError) else first_line(error)
        raise UserError(f"cannot write into {folder} ({reason}); choose another {flag}") from error


def lock(
    path: Path,
    waiting: str | None = None,  # for whom, in a note after a few seconds; None: it is a mistake to have to wait
) -> AbstractContextManager:
    """Lock a file until the context ends, or what is returned is gone, or this process ends.

    Nothing is locked where the file system has no locks. Raises filelock.Timeout where `waiting` is None and another
    process still has the lock after PATIENCE seconds.
    """
    file_lock = FileLock(path, is_singleton=True, fallback_to_soft=False)
    try:
        return file_lock.acquire(timeout=5 if waiting else PATIENCE)
    except Timeout:
        if not waiting:
            raise
    except (OSError, NotImplementedError):  # as on some network file systems
        return nullcontext()
    note(f"waiting for {waiting}")
    return file_lock.acquire()


def lock_folder(
    folder: Path,
    flag: str,  # the flag that chose it, for the message
) -> AbstractContextManager:
    """Keep other processes out of a folder, as `lock` does; raises UserError where another process is in it."""
    try:
        return lock(folder / ".lock")
    except Timeout:
        raise UserError(f"another process is writing into {folder}; choose another {flag}") from None


def write_atomic(
    path: str | os.PathLike,
    content: bytes | Callable[[BinaryIO], Any],  # or what writes it into an open file
) -> None:
    """Write a file such that a reader finds the old one or the new one and never a part.

    Raises UserError where it cannot be written; the file at `path` is then what it was.
    """
    def fill(partial: Path) -> None:
        with open(partial, "xb") as file:
            content(file) if callable(content) else file.write(content)
            file.flush()
            _sync(file.fileno())

    _write(Path(path), fill)


def write_folder_atomic(folder: Path, fill: Callable[[Path], Any]) -> None:
    """Let `fill` fill a new folder, and replace `folder` by it once it is complete.

    Raises UserError where it cannot be written; the old folder is then what it was.
    """
    def make(partial: Path) -> None:
        partial.mkdir()
        fill(partial)
        for path in partial.rglob("*"):
            if path.is_file():  # which safetensors makes readable by its owner alone
                with suppress(OSError):  # of file systems that have no such modes
                    path.chmod(partial.stat().st_mode & 0o666)
                with open(path, "rb+") as file:
                    _sync(file.fileno())

    _write(folder, make)


def _write(path: Path, make: Callable[[Path], None]) -> None:
    """Let `make` make a file or folder beside `path`, and give it that name."""
    # The full name might become too long; two processes may write what ends alike.
    token = secrets.token_hex(4)
    partial, old = (path.with_name(f".{path.name[-40:]}-{token}.{suffix}") for suffix in ("partial", "old"))
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            make(partial)
            if partial.is_dir() and path.is_dir():  # which cannot be replaced in one step
                os.replace(path, old)
            os.replace(partial, path)
        finally:
            if old.exists() and not path.exists():
                os.replace(old, path)
            _remove(partial, old)
        with suppress(OSError):  # the new name should be on the disk as well, where folders can be synchronised
            descriptor = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def _remove(*paths: Path) -> None:
    for path in paths:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _sync(descriptor: int) -> None:
    """Have a file on the disk, where the file system does that."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
            raise


def remove(path: Path) -> None:
    """Remove a file, if it is there; raises UserError where that is not possible."""
    with explained(path):
        path.unlink(missing_ok=True)


def csv_text(rows: Iterable[Iterable]) -> str:
    """Return a table as CSV, a quote before each text that a spreadsheet would take for a formula."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(
        [f"'{cell}" if isinstance(cell, str) and cell.startswith(FORMULA) else cell for cell in row] for row in rows)
    return text.getvalue()


def csv_cell(text: str) -> str:
    """Return what `csv_text` was given."""
    return text[1:] if text.startswith("'") and text[1:].startswith(FORMULA) else text


def append_line(path: Path, line: str) -> None:
    """Add a line to a log; raises UserError where it cannot be written."""
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a", encoding="utf-8") as file:
            file.write(line + "\n")
            file.flush()
            _sync(file.fileno())


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn a failure to write `path` into a UserError that says so."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:  # RuntimeError: torch.save on a full disk
        raise UserError(f"cannot write {path} ({first_line(error)}); see that the disk has room and that the folder "
                        "can be written") from error
