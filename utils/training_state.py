"""What a training run leaves in its folder: checkpoints, and the state from which it goes on as if never stopped."""
import pickle
import random
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from utils.errors import UserError, first_line
from utils.files import write_whole, write_whole_folder

_PARTS = {"network", "model", "optimizer", "scaler", "progress", "random", "configuration"}
_PUBLISHED_HEADS = 8  # attention heads leave no trace in the published format, which is always read as having these


@dataclass
class Progress:
    """How far a run is; an epoch's mean loss is over the iterations that were not skipped."""

    iteration: int = 0
    loss_sum: float = 0.0
    loss_count: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write the whole state of a run, a dictionary with the keys of `_PARTS`, in place of the one at `path`.

    Raises:
        UserError: where it cannot be written; the file at `path` is then what it was.
    """
    if missing := _PARTS - state.keys():
        raise ValueError(f"a training state needs {', '.join(sorted(missing))} as well")
    try:
        write_whole(path, lambda file: torch.save(state, file))
    except UserError as error:
        raise UserError(f"{error}, then go on with --resume") from error


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
        raise UserError(f"{path} is not a whole training state ({first_line(error)}); "
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


def save_checkpoint(
    net: nn.Module,  # an IDM
    folder: Path,  # of the run
    epoch: int,
) -> None:
    """The weights as a folder `pretrained`, and as net_params_EPOCH.pkl where the published format can hold them.

    Raises:
        UserError: where they cannot be written.
    """
    if net.config.num_attention_heads == _PUBLISHED_HEADS:
        on_cpu: dict[int, Tensor] = {}  # what has two names is stored once
        weights = {name: on_cpu.setdefault(tensor.data_ptr(), tensor.cpu())
                   for name, tensor in net.official_state_dict().items()}
        write_whole(folder / f"net_params_{epoch}.pkl", lambda file: torch.save(weights, file))
    write_whole_folder(folder / "pretrained", net.save_pretrained)


def holds_checkpoint(folder: Path) -> bool:
    """Whether a run, or somebody who put published weights there, has left a checkpoint in `folder`."""
    return (folder / "pretrained").exists() or any(folder.glob("net_params_*.pkl"))
