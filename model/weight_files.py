"""Weight files: where they are, and reading them without running code or believing more than the file holds.

A file may be damaged, or come from anybody: checksums are compared where there are any, time and memory are bounded by
the size of the file, and whatever is refused is refused in one sentence.

diffusers and the hub's client are imported where they are used: programs that need no network do not wait for them.
"""
import hashlib
import json
import pickle
import re
import stat
import zipfile
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor, nn

LDM_PREFIX = "model.diffusion_model."  # of the U-Net in a one-file Stable Diffusion checkpoint
WEIGHT_FILES = tuple(f"diffusion_pytorch_model.{end}" for end in (
    "safetensors", "safetensors.index.json", "fp16.safetensors", "safetensors.index.fp16.json",
    "bin", "bin.index.json", "fp16.bin", "bin.index.fp16.json"))  # an index names the shards of a large model
WRAPPERS = ("params_ema", "state_dict", "params", "model")  # keys under which trainers keep a network, the best first
PREFIXES = ("module.", "model.")  # of DistributedDataParallel, and of a network that is a member of something
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2)
LARGEST_JSON = 2**22  # bytes; Stable Diffusion XL's index has 0.2 MB

State = dict[str, Tensor]


class WeightsError(ValueError):
    """A weight file that is missing, unreadable, unsafe or does not fit; the message, a line, says which and where."""

    def __init__(self, message: str):
        shown = "".join(character if character.isprintable() else ascii(character)[1:-1] for character in message)
        super().__init__(shown if len(shown) <= 2000 else f"{shown[:2000]} ...")


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# --- where they are ------------------------------------------------------------------------------------------------

def fetch_unet(source: str) -> Path:
    """Return the folder of a hub id's U-Net: downloaded or, where the hub cannot be reached, of its local cache."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        raise WeightsError(f"{source} is neither a file, nor a folder, nor a hub id")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        folder = Path(hf_hub_download(source, "unet/config.json")).parent
        for name in WEIGHT_FILES:
            try:
                path = Path(hf_hub_download(source, f"unet/{name}"))
            except EntryNotFoundError as error:
                if not isinstance(error, LocalEntryNotFoundError):
                    continue  # the hub has no such file
                if not any((folder / other).is_file() for other in WEIGHT_FILES):
                    raise
                break  # the hub was not reached, but another file is in the cache
            for shard in shards(path):
                hf_hub_download(source, f"unet/{shard}")
            break
    except WeightsError:
        raise
    except Exception as error:  # what a hub client can raise is not written down anywhere
        raise WeightsError(f"{source} is no file or folder here, nor could its U-Net be had from the hub; mind the "
                           "spelling and the network, or name a local folder or file "
                           f"(the hub's client says: {first_line(error)})") from error
    return folder


def snapshot(folder: Path) -> Path:
    """Return the current snapshot in a folder models--OWNER--NAME of the hub's cache; any other folder as it is."""
    if not (folder / "snapshots").is_dir():
        return folder
    found = sorted(path for path in (folder / "snapshots").iterdir() if path.is_dir())
    main = folder / "refs" / "main"
    current = folder / "snapshots" / _read(main, 100).decode(errors="replace").strip() if main.is_file() else None
    if current in found:
        return current
    if len(found) != 1:
        raise WeightsError(f"{folder} holds {len(found)} snapshots of a model, and none is marked as its current one; "
                           f"name one of the folders in {folder / 'snapshots'}")
    return found[0]


def weight_files(folder: Path) -> list[Path]:
    """Return the file of a model's folder that holds its weights, or all shards of it."""
    for name in WEIGHT_FILES:
        if (folder / name).is_file():
            return [folder / shard for shard in shards(folder / name)] or [folder / name]
    raise WeightsError(f"{folder} holds no weights: there is none of {', '.join(WEIGHT_FILES)} in it"
                       f"{_files_to_name(folder)}")


def shards(index: Path) -> list[str]:
    """Return the names of the files among which an index, *.json, spreads a model; none for any other file."""
    if index.suffix != ".json":
        return []
    content = read_json(index)
    names = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise WeightsError(f"{index} is no index of weight files: it has no weight_map")
    for name in (names := sorted(set(names.values()))):
        if not re.fullmatch(r"[\w-][\w.-]*\.(safetensors|bin)", name):  # it must be beside the index
            raise WeightsError(f"{index} was refused: it names {name}, which is no weight file beside it")
    return names


def read_config(folder: Path, class_name: str) -> dict[str, Any]:
    """Return the content of a model's config.json; raises WeightsError where it is of another class."""
    if not (folder / "config.json").exists():
        pipeline = "; it holds a pipeline, of which its folder unet is meant" if (folder / "unet").is_dir() else ""
        raise WeightsError(f"{folder} holds no model of diffusers: there is no config.json in it"
                           f"{pipeline or _files_to_name(folder)}")
    config = read_json(folder / "config.json")
    found = config.get("_class_name") if isinstance(config, dict) else None
    if found != class_name:
        raise WeightsError(f"{folder} holds {found or 'an unnamed model'}, not {class_name}")
    return config


def read_json(path: Path) -> Any:
    content = _read(path, LARGEST_JSON + 1)
    if len(content) > LARGEST_JSON:
        raise WeightsError(f"{path} cannot be read: it is larger than any file of its kind")
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{path} cannot be read: {first_line(error)}") from error


def _files_to_name(folder: Path) -> str:
    kinds = (".pkl", ".safetensors", ".ckpt", ".bin", ".pth", ".pt")
    found = sorted(path.name for path in folder.glob("*") if path.suffix in kinds)
    return f", but {', '.join(found[:5])}; name that file" if found else ""


# --- reading -------------------------------------------------------------------------------------------------------

def read_tensors(path: Path) -> State:
    """Read the tensors of a .safetensors file or a pickle; of a one-file Stable Diffusion v1 checkpoint its U-Net.

    Returns them under bare names: what data parallelism, `torch.compile` and trainers put around a network is removed,
    and the names of one-file checkpoints become diffusers'.
    The tensors are mapped, not copied: of a file of 4 GB only those that are used come into memory.
    """
    head = _read(path, 64)
    if head.startswith(b"version https://git-lfs"):
        raise WeightsError(f"{path} holds no weights but a pointer of Git LFS; git lfs pull fetches the file itself")
    _compare_with_blob_name(path)
    if head[8:9] == b"{" or path.suffix == ".safetensors":
        state = _read_safetensors(path)
    else:
        state = _unwrapped(_read_pickle(path, zipped=head.startswith(b"PK")), path)
        _check_extent(state, path)
    state = _bare_names(state, path)
    ldm = {name: tensor for name, tensor in state.items() if str(name).startswith(LDM_PREFIX)}
    if not ldm:
        return state
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    try:
        state = convert_ldm_unet_checkpoint(ldm, {"layers_per_block": 2})
    except KeyError as error:
        raise WeightsError(f"{path} does not fit: missing key {LDM_PREFIX}{error.args[0]}") from error
    return {name: tensor for name, tensor in state.items() if tensor is not None}  # None: missing, to the converter


def read_sharded(paths: list[Path]) -> State:
    """Read the tensors of all files together."""
    state: State = {}
    for path in paths:
        part = read_tensors(path)
        if twice := state.keys() & part.keys():
            raise WeightsError(f"{path} does not fit: another file beside it holds {min(twice)} as well")
        state |= part
    return state


def is_plain(value: Any) -> bool:
    """Whether this is a dense tensor of floating-point numbers, which can be copied into a parameter."""
    return (isinstance(value, Tensor) and type(value) in (Tensor, nn.Parameter) and value.layout is torch.strided
            and not value.is_nested and not value.is_meta and value.dtype in FLOATS)


def zip_damage(path: Path) -> str | None:
    """Return what is wrong with a zip file that torch.save wrote, or None; torch.load compares no checksums.

    Raises:
        OSError, zipfile.BadZipFile, RuntimeError, NotImplementedError, EOFError: where it is no whole zip file.
    """
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            if entry.compress_type != zipfile.ZIP_STORED:  # mapped, it would be numbers as well
                return "its entries are compressed; unpack it, and pack it again with zip -0 -r"
            if entry.external_attr & 0x10 and not entry.is_dir():  # torch.load would leave its memory as it finds it
                return f"{entry.filename} is marked as a folder"
        damaged = archive.testzip()
    return damaged and f"{damaged} is not as it was written"


def _read(path: Path, most: int) -> bytes:
    """Return the first bytes of a regular file: a pipe would wait, and a device might never end."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise WeightsError(f"{path} cannot be read: it is no regular file")
        with open(path, "rb") as file:
            return file.read(most)
    except FileNotFoundError as error:
        raise WeightsError(f"there is no weight file {path}") from error
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {first_line(error)}") from error


def _compare_with_blob_name(path: Path) -> None:
    """In the hub's cache the name of a large file is the SHA-256 of its content."""
    blob = path.resolve()
    if blob.parent.name == "blobs" and re.fullmatch("[0-9a-f]{64}", blob.name):
        with open(blob, "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != blob.name:
                raise WeightsError(f"{path} is damaged: its SHA-256 is not the one it was downloaded with; remove "
                                   f"{blob}, and it will be fetched again")


def _read_safetensors(path: Path) -> State:
    try:
        with safetensors.safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no dictionary
    except Exception as error:  # a data type that PyTorch lacks is a KeyError or RuntimeError
        raise WeightsError(f"{path} cannot be read (is it truncated?): {first_line(error)}") from error


def _read_pickle(path: Path, zipped: bool) -> Any:
    try:
        damage = zip_damage(path) if zipped else None
        if damage is None:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        raise WeightsError(f"{path} was refused: it holds more than bare tensors, which could run code, or is no "
                           "PyTorch file at all (a broken download?); take its .safetensors version, or the folder it "
                           "lies in, where there is one") from error
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise WeightsError(f"{path} cannot be read (is it truncated?): {first_line(error)}") from error
    raise WeightsError(f"{path} was refused: {damage}")


def _unwrapped(content: Any, path: Path) -> dict[Any, Any]:
    """Return the network's dictionary out of those that trainers put around it."""
    for _ in range(3):  # a dictionary may hold itself
        inner = [content[key] for key in WRAPPERS if isinstance(content, dict) and isinstance(content.get(key), dict)]
        if not inner:
            break
        content = inner[0]
    if not isinstance(content, dict):
        raise WeightsError(f"{path} holds no dictionary of tensors")
    return content


def _check_extent(state: dict[Any, Any], path: Path) -> None:
    """Refuse tensors that are larger than what is stored of them; what has two names counts once."""
    plain = filter(is_plain, state.values())
    extent = sum({(tensor.data_ptr(), tensor.shape): tensor.nbytes for tensor in plain}.values())
    if extent > path.stat().st_size:
        raise WeightsError(f"{path} was refused: its tensors would be {extent:,} bytes, the file has "
                           f"{path.stat().st_size:,}: some are expanded, or share their memory; clone them first")


def _bare_names(state: dict[Any, Any], path: Path) -> dict[Any, Any]:
    """Remove from all names what wrappers of a network add; compiled parts may be anywhere in it."""
    bare = {name.replace("_orig_mod.", "") if isinstance(name, str) else name: name for name in state}
    while prefix := next((prefix for prefix in PREFIXES if bare and all(
            str(name).startswith(prefix) and not str(name).startswith(LDM_PREFIX) for name in bare)), None):
        bare = {name.removeprefix(prefix): original for name, original in bare.items()}
    if len(bare) < len(state):
        raise WeightsError(f"{path} does not fit: some of its keys differ only by _orig_mod.")
    return {name: state[original] for name, original in bare.items()}
