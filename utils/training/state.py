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

from model.weight_files import zip_damage
from utils.devices import memory_suffices
from utils.errors import UserError, first_line
from utils.files import remove, write_atomic, write_folder_atomic


class DamagedState(UserError):
    """A file that is not, or no longer, a whole training state."""


@dataclass
class Progress:
    """How far a run is; an epoch's mean loss is over the iterations that were not skipped."""

    iteration: int = 0
    crops: int = 0  # that all processes have drawn together, counting those of the run that this one decays from
    before: int = 0  # iterations of that run
    loss_sum: float = 0.0  # since the beginning of the epoch
    loss_count: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0


@dataclass
class TrainingState:
    """All from which a run goes on, on the CPU."""

    configuration: dict[str, Any]  # the settings that decide what the weights will be
    processes: int
    network: dict[str, Any]  # arguments of IDM
    model: dict[str, Tensor]
    ema: dict[str, Tensor] | None
    optimizer: dict[str, Any]
    scaler: dict[str, Any]
    progress: Progress
    random: list[dict[str, Any]]  # `random_states()` of each process
    unlogged: dict[str, Any] | None = None  # record of the epoch just finished, whose tests are still to be done


def save_state(folder: Path, state: TrainingState) -> None:
    """Write a state into the run's folder.

    The newest state that is there already stays; all others go.

    Raises:
        UserError: where it cannot be written; the states that are there stay.
    """
    path = folder / f"state_{state.progress.iteration:08d}.pt"
    before = [other for other in list_states(folder) if other.name < path.name]
    content = vars(state) | {"progress": vars(state.progress)}  # plain types, that no code need be unpickled
    try:
        write_atomic(path, lambda file: torch.save(content, file))
    except UserError as error:
        raise UserError(f"{error}, then start the same command again to go on from the last state") from error
    # What has a higher number was found damaged, or the run would not be back here.
    for other in {*list_states(folder), *folder.glob(".state_*.partial")} - {path, *before[:1]}:
        remove(other)


def list_states(folder: Path) -> list[Path]:
    """The states in a run's folder, the newest first."""
    return sorted((path for path in folder.glob("state_*.pt") if re.fullmatch(r"state_\d{8,}\.pt", path.name)),
                  reverse=True)


def load_newest_state(folder: Path) -> tuple[TrainingState | None, list[str]]:
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


def load_state(path: Path) -> TrainingState:
    """Read what `save_state` wrote, onto the CPU.

    Raises:
        DamagedState: where the file is damaged or is something else.
        UserError: where it may not be read, or there is not enough memory for it.
    """
    try:
        with memory_suffices(f"to read {path}"):
            if (damage := zip_damage(path)) is None:
                content = torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError as error:
        raise UserError(f"cannot read {path} ({first_line(error)})") from error
    except (OSError, EOFError, RuntimeError, ValueError, KeyError, pickle.UnpicklingError, zipfile.BadZipFile,
            zlib.error) as error:
        raise DamagedState(f"{path} is not a whole training state ({first_line(error)})") from error
    if damage is not None:
        raise DamagedState(f"{path} is damaged ({damage})")
    try:
        return TrainingState(**{**content, "progress": Progress(**{**content}["progress"])})
    except (TypeError, KeyError) as error:
        raise DamagedState(f"{path} is not a training state of this program") from error


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
        write_atomic(folder / f"net_params_{epoch}.pkl", lambda file: torch.save(weights, file))
    write_folder_atomic(folder / "pretrained", net.save_pretrained)


def holds_checkpoint(folder: Path) -> bool:
    """Whether a run, or somebody who put published weights there, has left a checkpoint in `folder`."""
    return (folder / "pretrained").exists() or any(folder.glob("net_params_*.pkl"))
