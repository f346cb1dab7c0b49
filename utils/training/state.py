"""What a training run leaves in its folder: checkpoints, and the states from which it goes on as if never stopped."""
import pickle
import random
import re
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from utils.devices import memory_suffices
from utils.errors import UserError, first_line
from utils.files import remove, write_whole, write_whole_folder


class DamagedState(UserError):
    """A file that is not, or no longer, a whole training state."""


_PARTS = {"network", "model", "ema", "optimizer", "scaler", "progress", "random", "configuration", "processes"}


@dataclass
class Progress:
    """How far a run is; an epoch's mean loss is over the iterations that were not skipped."""

    iteration: int = 0
    crops: int = 0  # that all processes have drawn together
    loss_sum: float = 0.0  # since the beginning of the epoch
    loss_count: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0


def save_state(folder: Path, state: dict[str, Any]) -> None:
    """Write the whole state of a run, a dictionary with the keys of `_PARTS`, into the run's folder.

    The newest state that is there already stays; all others go.

    Raises:
        UserError: where it cannot be written; the states that are there stay.
    """
    if missing := _PARTS - state.keys():
        raise ValueError(f"a training state needs {', '.join(sorted(missing))} as well")
    path = folder / f"state_{state['progress']['iteration']:08d}.pt"
    before = [other for other in list_states(folder) if other.name < path.name]
    try:
        write_whole(path, lambda file: torch.save(state, file))
    except UserError as error:
        raise UserError(f"{error}, then start the same command again to go on from the last state") from error
    # What has a higher number was found damaged, or the run would not be back here.
    for other in {*list_states(folder), *folder.glob(".state_*.partial")} - {path, *before[:1]}:
        remove(other)


def list_states(folder: Path) -> list[Path]:
    """The states in a run's folder, the newest first."""
    return sorted((path for path in folder.glob("state_*.pt") if re.fullmatch(r"state_\d{8,}\.pt", path.name)),
                  reverse=True)


def load_newest_state(folder: Path) -> tuple[dict[str, Any] | None, list[str]]:
    """The newest whole state in a run's folder, onto the CPU, and a sentence about each newer one that is damaged.

    Returns None where there is no state at all.

    Raises:
        UserError: where there are states, but none is whole, or the newest cannot be read here, though it may be.
    """
    damaged = []
    for path in list_states(folder):
        try:
            return load_state(path), [f"{reason}; going on from the one before it" for reason in damaged]
        except DamagedState as error:
            damaged.append(str(error))
    if damaged:
        raise UserError(f"{'; '.join(damaged)}; remove {folder} to start again")
    return None, []


def load_state(path: Path) -> dict[str, Any]:
    """Read what `save_state` wrote, onto the CPU.

    Raises:
        DamagedState: where the file is damaged or is something else.
        UserError: where it may not be read, or there is not enough memory for it.
    """
    try:
        with memory_suffices(f"to read {path}"):
            with zipfile.ZipFile(path) as archive:  # torch.load does not look at the checksums
                # And where an entry is marked as a folder, it leaves the tensor as it finds it in memory.
                marked = (entry.filename for entry in archive.infolist() if entry.external_attr)
                damaged = archive.testzip() or next(marked, None)
            if damaged is None:
                state = torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError as error:
        raise UserError(f"cannot read {path} ({first_line(error)})") from error
    except (OSError, EOFError, RuntimeError, ValueError, KeyError, pickle.UnpicklingError, zipfile.BadZipFile,
            zlib.error) as error:
        raise DamagedState(f"{path} is not a whole training state ({first_line(error)})") from error
    if damaged is not None:
        raise DamagedState(f"{path} is damaged ({damaged} is not as it was written)")
    if not isinstance(state, dict) or _PARTS - state.keys():
        raise DamagedState(f"{path} is not a training state of this program")
    return state


def check_configuration(saved: dict[str, Any], now: dict[str, Any], folder: Path) -> None:
    """Refuse to continue a run with settings that would give another result.

    Raises:
        UserError: that lists every difference.
    """
    differences = [f"{name} was {saved.get(name)}, is {now.get(name)}"
                   for name in sorted(saved.keys() | now.keys()) if saved.get(name) != now.get(name)]
    if differences:
        raise UserError(f"{folder} holds a run with other settings: {'; '.join(differences)}; "
                        "use the same, or another --model_dir")


def seed_all(seed: int) -> None:
    """Seed Python's, NumPy's and PyTorch's generators, those of all devices."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


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


def save_checkpoint(
    net: nn.Module,  # an IDM
    folder: Path,  # of the run
    epoch: int,
) -> None:
    """The weights as a folder `pretrained`, and as net_params_EPOCH.pkl where the published format can hold them.

    Raises:
        UserError: where they cannot be written.
    """
    if net.fits_official_format:
        on_cpu: dict[int, Tensor] = {}  # what has two names is stored once
        weights = {name: on_cpu.setdefault(tensor.data_ptr(), tensor.cpu())
                   for name, tensor in net.official_state_dict().items()}
        write_whole(folder / f"net_params_{epoch}.pkl", lambda file: torch.save(weights, file))
    write_whole_folder(folder / "pretrained", net.save_pretrained)


def holds_checkpoint(folder: Path) -> bool:
    """Whether a run, or somebody who put published weights there, has left a checkpoint in `folder`."""
    return (folder / "pretrained").exists() or any(folder.glob("net_params_*.pkl"))
