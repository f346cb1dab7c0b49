"""Weight files: where they lie, and reading them without running code or loading what is not asked for."""
import json
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import safetensors
import torch
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from torch import Tensor

LDM_PREFIX = "model.diffusion_model."  # of the U-Net in a one-file Stable Diffusion checkpoint
WEIGHT_FILES = tuple(f"diffusion_pytorch_model.{end}" for end in ("safetensors", "fp16.safetensors", "bin"))

State = dict[str, Tensor]


class WeightsError(ValueError):
    """A weight file that is missing, unreadable, unsafe or does not fit; the message says which and where."""


def fetch_pipeline(source: str) -> Path:
    """Local folder of a hub id's pipeline, of which the U-Net is there: downloaded, or in the cache already."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        raise WeightsError(f"{source} is neither a file, nor a folder, nor a hub id")
    try:
        config = hf_hub_download(source, "unet/config.json")
        for name in WEIGHT_FILES:
            try:
                hf_hub_download(source, f"unet/{name}")
                break
            except EntryNotFoundError as error:
                if isinstance(error, LocalEntryNotFoundError):  # not reached, while its parent says: reached, not there
                    raise
    except Exception as error:  # what a hub client can raise is not written down anywhere
        raise WeightsError(f"{source} is no file or folder here, nor could its U-Net be had from the hub; mind the "
                           "spelling and the network, or name a local folder or file "
                           f"(the hub's client says: {first_line(error)})") from error
    return Path(config).parent.parent


def read_config(folder: Path, class_name: str) -> dict[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        published = sorted(path.name for path in folder.glob("net_params_*.pkl"))
        instead = f", but {', '.join(published)}; name that file" if published else ""
        raise WeightsError(f"{folder} holds no model of diffusers: there is no config.json in it{instead}") from error
    except (OSError, ValueError) as error:
        raise WeightsError(f"{folder}/config.json cannot be read: {first_line(error)}") from error
    found = config.get("_class_name") if isinstance(config, dict) else None
    if found != class_name:
        raise WeightsError(f"{folder} holds {found or 'an unnamed model'}, not {class_name}")
    return config


def weight_file(folder: Path) -> Path:
    for name in WEIGHT_FILES:
        if (folder / name).is_file():
            return folder / name
    raise WeightsError(f"{folder} holds no weights: there is none of {', '.join(WEIGHT_FILES)} in it")


def read_tensors(path: Path) -> State:
    """Tensors of a .safetensors file or a pickle; of a one-file Stable Diffusion v1 checkpoint its U-Net, renamed.

    The tensors are mapped, not read: of a file of 4 GB only those that are copied come into memory.
    """
    if path.suffix == ".safetensors":
        try:
            with safetensors.safe_open(path, "pt") as file:
                state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no dictionary
        except (OSError, safetensors.SafetensorError) as error:
            raise WeightsError(f"{path} cannot be read (is it truncated?): {first_line(error)}") from error
    else:
        state = read_pickle(path)
        state = state.get("state_dict", state) if isinstance(state, dict) else state
        if not isinstance(state, dict):
            raise WeightsError(f"{path} holds no dictionary of tensors")
    ldm = {name: tensor for name, tensor in state.items() if str(name).startswith(LDM_PREFIX)}
    if not ldm:
        return state
    try:
        state = convert_ldm_unet_checkpoint(ldm, {"layers_per_block": 2})
    except KeyError as error:
        raise WeightsError(f"{path} does not fit: missing key {LDM_PREFIX}{error.args[0]}") from error
    return {name: tensor for name, tensor in state.items() if tensor is not None}  # None: missing, to the converter


def read_pickle(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except FileNotFoundError as error:
        raise WeightsError(f"there is no weight file {path}") from error
    except pickle.UnpicklingError as error:
        raise WeightsError(f"{path} was refused: it holds more than bare tensors, which could run code, or is no "
                           "PyTorch file at all (a broken download?); take its .safetensors version, or the folder it "
                           "lies in, where there is one") from error
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise WeightsError(f"{path} cannot be read (is it truncated?): {first_line(error)}") from error


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
