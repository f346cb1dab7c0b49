"""Files and folders that are whole or not there, and on the disk when the function returns."""
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from utils.errors import UserError, first_line

PATIENCE = 15  # seconds in which the workers of a process that was killed end as well


def make_folder(
    folder: Path,
    flag: str,  # the flag that chose it, for the message
) -> None:
    """Make a folder, if need be, and find out now whether files can be written into it; raises UserError if not."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = "it is a file" if isinstance(error, FileExistsError) else first_line(error)
        raise UserError(f"cannot write into {folder} ({reason}); choose another {flag}") from error


def hold(
    folder: Path,
    flag: str,  # the flag that chose it, for the message
) -> AbstractContextManager:
    """Keep other processes out of a folder until the context ends, or what is returned is gone, or this process ends.

    Raises:
        UserError: where another process holds it.
    """
    lock = FileLock(folder / ".lock", is_singleton=True, fallback_to_soft=False)
    try:
        return lock.acquire(timeout=PATIENCE)
    except Timeout:
        raise UserError(f"another process is writing into {folder}; choose another {flag}") from None
    except (OSError, NotImplementedError):  # some network file systems have no locks
        return nullcontext()


def write_whole(
    path: str | os.PathLike,
    content: bytes | Callable[[BinaryIO], Any],  # or what writes it into an open file
) -> None:
    """Write a file such that a reader finds the old one or the new one and never a part; one process at a time may.

    Raises:
        UserError: where it cannot be written; the file at `path` is then what it was.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name[-40:]}.partial")  # the whole name might become too long
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(partial, "wb") as file:
                content(file) if callable(content) else file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
        _sync(path.parent)  # the new name must be on the disk as well


def write_whole_folder(folder: Path, fill: Callable[[Path], Any]) -> None:
    """Let `fill` fill a new folder, and put it in the place of `folder` once it is full.

    Raises:
        UserError: where it cannot be written; the old folder is then what it was.
    """
    partial, old = (folder.with_name(f".{folder.name}.{word}") for word in ("partial", "old"))
    with explained(folder):
        try:
            shutil.rmtree(partial, ignore_errors=True)
            shutil.rmtree(old, ignore_errors=True)
            partial.mkdir(parents=True)
            fill(partial)
            for path in partial.rglob("*"):
                if path.is_file():  # which safetensors makes readable by its owner alone
                    path.chmod(partial.stat().st_mode & 0o666)
                _sync(path)
            if folder.exists():
                os.replace(folder, old)
            os.replace(partial, folder)
            _sync(folder.parent)
        finally:
            if old.exists() and not folder.exists():
                os.replace(old, folder)
            shutil.rmtree(partial, ignore_errors=True)
            shutil.rmtree(old, ignore_errors=True)


def remove(path: Path) -> None:
    """Remove a file, if it is there; raises UserError where that is not possible."""
    with explained(path):
        path.unlink(missing_ok=True)


def append_line(path: Path, line: str) -> None:
    """Add a line to a log.

    Raises:
        UserError: where it cannot be written.
    """
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a", encoding="utf-8") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())


def _sync(path: Path) -> None:
    """Have a file, or a folder's list of names, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn a failure to write `path` into a UserError that says so."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:  # RuntimeError: torch.save on a full disk
        raise UserError(f"cannot write {path} ({first_line(error)}); see that the disk has room and that the folder "
                        "can be written") from error
