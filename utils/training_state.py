"""Files a training run leaves behind, each whole or not there: its state, its checkpoints, its log."""
import os
import pickle
import random
import shutil
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from safetensors import SafetensorError

from utils.errors import UserError

_PARTS = {"network", "model", "optimizer", "scaler", "progress", "random", "configuration"}


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write the whole state of a run, a dictionary with the keys of `_PARTS`, in place of the one at `path`.

    Raises:
        UserError: where it cannot be written; the file at `path` is then what it was.
    """
    if missing := _PARTS - state.keys():
        raise ValueError(f"a training state needs {', '.join(sorted(missing))} as well")
    save_atomically(state, path)


def load_state(path: Path) -> dict[str, Any]:
    """Read what `save_state` wrote, onto the CPU.

    Raises:
        UserError: where the file is damaged or is something else.
    """
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load does not look at the checksums
            damaged = archive.testzip()
        if damaged is None:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, ValueError, KeyError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is not a whole training state ({_first_line(error)}); "
                        "remove it to start again") from error
    if damaged is not None:
        raise UserError(f"{path} is damaged (wrong checksum of {damaged}); remove it to start again")
    if not isinstance(state, dict) or _PARTS - state.keys():
        raise UserError(f"{path} is not a training state of this program; remove it to start again")
    return state


def check_configuration(saved: dict[str, Any], now: dict[str, Any], path: Path) -> None:
    """Refuse to continue a run with settings that would give another result.

    Raises:
        UserError: that lists every difference.
    """
    differences = [f"{name} was {saved.get(name)}, is {now.get(name)}"
                   for name in sorted(saved.keys() | now.keys()) if saved.get(name) != now.get(name)]
    if differences:
        raise UserError(f"{path} is of a run with other settings: {'; '.join(differences)}; "
                        "use the same, or another --model_dir")


def random_states() -> dict[str, Any]:
    """States of Python's, NumPy's, PyTorch's and this process's CUDA generators, of plain types and tensors."""
    name, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (name, keys.tolist(), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def restore_random_states(states: dict[str, Any]) -> None:
    """Undo every draw since `random_states()`."""
    name, keys, *rest = states["numpy"]
    random.setstate(states["python"])
    np.random.set_state((name, np.array(keys, np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    if states["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def save_atomically(thing: Any, path: Path) -> None:
    """torch.save to `path`, such that a reader finds the old file or the new one and never a part.

    Raises:
        UserError: where it cannot be written; the file at `path` is then what it was.
    """
    with _explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_beside(path, lambda file: torch.save(thing, file))


def save_folder_atomically(write: Callable[[Path], None], folder: Path) -> None:
    """Let `write` fill a new folder, and put it in the place of `folder` once it is full.

    Raises:
        UserError: where it cannot be written; the old folder is then what it was.
    """
    partial, old = (folder.with_name(f".{folder.name}.{word}") for word in ("partial", "old"))
    with _explained(folder):
        try:
            shutil.rmtree(partial, ignore_errors=True)
            shutil.rmtree(old, ignore_errors=True)
            partial.mkdir(parents=True)
            write(partial)
            for path in partial.rglob("*"):
                _sync(path)
            if folder.exists():
                os.replace(folder, old)
            os.replace(partial, folder)
        finally:
            if old.exists() and not folder.exists():
                os.replace(old, folder)
            shutil.rmtree(partial, ignore_errors=True)
            shutil.rmtree(old, ignore_errors=True)


def append_line(path: Path, line: str) -> None:
    """Add a line to a log, on the disk when this returns.

    Raises:
        UserError: where it cannot be written.
    """
    with _explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a", encoding="utf-8") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())


def _write_beside(path: Path, write: Callable[[BinaryIO], None]) -> None:
    partial = path.with_name(f".{path.name}.partial")
    try:
        with open(partial, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    _sync(path.parent)  # the new name must be on the disk as well


def _sync(path: Path) -> None:
    """Have a file, or a folder's list of names, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:  # RuntimeError: torch.save on a full disk
        raise UserError(f"cannot write {path} ({_first_line(error)}); see that the disk has room and the folder can be "
                        "written, then continue with --resume") from error


def _first_line(error: Exception) -> str:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return reason.partition("\n")[0] or type(error).__name__
