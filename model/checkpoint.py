"""Weights in and out: the published format, our own folders, and Stable Diffusion base models.

The published format is a pickled state_dict that holds every module of a chain twice, under its own name and under the
chain's: unet.down_blocks.0.resnets.1.… and unet.down_blocks.0.rev_module_lists.1.0.body.… are the same numbers.
"""
import json
import math
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors
import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from torch import Tensor, nn

from .injector import Injector
from .reversible import ReversibleChain
from .unet import Attention, DownBlock, Resnet, UpBlock

if TYPE_CHECKING:
    from .idm import IDM

LDM_PREFIX = "model.diffusion_model."  # of the U-Net in a one-file Stable Diffusion checkpoint
DEFAULT_HEADS = 8  # attention heads leave no trace in the weights; Stable Diffusion v1.5 has 8

State = dict[str, Tensor]


class WeightsError(ValueError):
    """A weight file that is missing, unreadable, unsafe or does not fit; the message says which and where."""


# --- names ---------------------------------------------------------------------------------------------------------

def official_names(net: "IDM") -> Iterator[tuple[str, nn.Parameter]]:
    """(published name, parameter), each parameter of a chain under both of its names."""
    yield "input_help_scale_factor", net.input_scale
    yield "merge_scale_factor", net.merge_scale
    yield "alpha", net.schedule.alpha
    for i, coupling in enumerate(net.steps):
        yield f"body.{i}.v", coupling.v
    unet = net.unet
    yield from _under("unet.conv_in", unet.conv_in)
    for i, block in enumerate(unet.down_blocks):
        prefix = f"unet.down_blocks.{i}"
        yield f"{prefix}.input_help_scale_factor", block.input_scale
        yield f"{prefix}.merge_scale_factors", block.merge_scales
        yield from _block_names(prefix, block)
        for pair, chain in enumerate(block.chains):
            yield from _chain_names(f"{prefix}.rev_module_lists.{pair}", chain)
    for i, block in enumerate(unet.up_blocks):
        prefix = f"unet.up_blocks.{i}"
        yield f"{prefix}.input_help_scale_factor", block.input_scale
        yield f"{prefix}.merge_scale_factor", block.merge_scale
        yield from _block_names(prefix, block)
        yield from _chain_names(f"{prefix}.rev_module_list", block.chain)
    yield from _under("unet.conv_norm_out", unet.conv_norm_out)
    yield from _under("unet.conv_out", unet.conv_out)


def base_names(net: "IDM") -> Iterator[tuple[str, nn.Parameter]]:
    """(name in diffusers' UNet2DConditionModel, parameter) of all that Stable Diffusion has too."""
    for name, parameter in official_names(net):
        if name.startswith("unet.") and not re.search(r"scale_factor|injectors|rev_module_list", name):
            name = name.removeprefix("unet.")
            # Our two up blocks are the last two of Stable Diffusion's four.
            yield re.sub(r"^up_blocks\.(\d)", lambda m: f"up_blocks.{int(m[1]) + 2}", name), parameter


def _under(prefix: str, module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    for name, parameter in module.named_parameters():
        yield f"{prefix}.{name}", parameter


def _body_names(prefix: str, body: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    if not isinstance(body, Injector):
        yield from _under(prefix, body.block)
        return
    for step, convolution in enumerate(body.lift):
        yield from _under(f"{prefix}.f2i.{step}.1", convolution)
    for step, convolution in enumerate(body.unlift):
        yield from _under(f"{prefix}.i2f.{step}.0", convolution)


def _block_names(prefix: str, block: DownBlock | UpBlock) -> Iterator[tuple[str, nn.Parameter]]:
    """What a block holds, under the names it has outside its chains; in published order."""
    down = isinstance(block, DownBlock)
    chains = block.chains if down else [block.chain]
    bodies = [block.entry, *(coupling.body for chain in chains for coupling in chain)]

    def numbered(kind: str, cls: type[nn.Module]) -> Iterator[tuple[str, nn.Parameter]]:
        for i, body in enumerate(body for body in bodies if isinstance(body, cls)):
            yield from _body_names(f"{prefix}.{kind}.{i}", body)

    yield from numbered("attentions", Attention)
    yield from numbered("resnets", Resnet)
    resample = block.downsample if down else block.upsample
    if resample is not None:
        yield from _under(f"{prefix}.{'downsamplers' if down else 'upsamplers'}.0", resample)
    yield from numbered("injectors", Injector)


def _chain_names(prefix: str, chain: ReversibleChain) -> Iterator[tuple[str, nn.Parameter]]:
    for i, coupling in enumerate(chain):
        yield f"{prefix}.{i}.v", coupling.v
        yield from _body_names(f"{prefix}.{i}.body", coupling.body)


# --- the published format ------------------------------------------------------------------------------------------

def read_official(path: Path) -> State:
    """The state_dict of a published checkpoint; the unpickler runs no code."""
    state = _read_pickle(path)
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise WeightsError(f"{path} holds no state_dict: a published checkpoint is a dictionary of tensors")
    return {name.removeprefix("module."): tensor for name, tensor in state.items()}


def official_config(state: State, path: Path) -> dict[str, Any]:
    """The arguments of IDM that a published checkpoint's shapes tell."""
    unet = {name.removeprefix("unet."): tensor for name, tensor in state.items() if name.startswith("unet.")}
    if "alpha" not in state:
        raise WeightsError(f"{path} does not hold an IDM: key alpha is missing")
    return {
        "block_out_channels": widths(unet, path),
        "num_steps": len(state["alpha"]),
        "shuffle": shuffle(unet, path),
        "num_attention_heads": DEFAULT_HEADS,
    }


def load_official(net: "IDM", state: State, path: Path) -> None:
    """Copy a published state_dict into `net`; raises WeightsError naming every key that does not fit."""
    names = list(official_names(net))
    problems = [f"unexpected key {key}" for key in state.keys() - {name for name, _ in names}]
    seen: dict[nn.Parameter, str] = {}
    for name, parameter in names:
        first = seen.setdefault(parameter, name)
        if name in state and first in state and not torch.equal(state[name], state[first]):
            problems.append(f"{name} differs from {first}, though they are one parameter")
    _load(names, state, path, problems)


# --- our own folders -----------------------------------------------------------------------------------------------

def read_pretrained(cls: type["IDM"], folder: Path) -> "IDM":
    """`from_pretrained` of a local folder, which raises WeightsError where that would fill gaps with random numbers."""
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise WeightsError(f"{folder} is no folder of ours: its config.json cannot be read ({error})") from error
    if config.get("_class_name") != cls.__name__:
        raise WeightsError(f"{folder} holds a {config.get('_class_name')}, not an {cls.__name__}")
    try:
        net, info = cls.from_pretrained(folder, local_files_only=True, output_loading_info=True)
    except (OSError, ValueError, RuntimeError, TypeError, safetensors.SafetensorError) as error:
        raise WeightsError(f"{folder} cannot be loaded: {_first_line(error)}") from error
    problems = [f"{kind.replace('_', ' ')}: {key}" for kind, keys in info.items() for key in keys]
    if problems:
        raise WeightsError(_complaint(folder, problems))
    return net


# --- base models ---------------------------------------------------------------------------------------------------

def read_base_unet(source: str | Path) -> tuple[State, int]:
    """State_dict of a Stable Diffusion U-Net under diffusers' names, and its number of attention heads.

    Args:
        source: a local folder (of a pipeline or of its U-Net), a local file (.safetensors, or .ckpt and .bin, which are
            pickles and are read without running code), or a hub id, of which only the U-Net is fetched.

    Raises:
        WeightsError: where the source is missing or holds no U-Net.
    """
    path = Path(source)
    if path.is_file():
        return _read_one_file(path), DEFAULT_HEADS
    try:
        if path.is_dir():
            folder = path / "unet" if (path / "unet").is_dir() else path
            unet = UNet2DConditionModel.from_pretrained(folder, local_files_only=True)
        elif re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
            unet = UNet2DConditionModel.from_pretrained(str(source), subfolder="unet")
        else:
            raise WeightsError(f"{source} is neither a file, nor a folder, nor a hub id")
    except WeightsError:
        raise
    except Exception as error:  # what a hub client can raise is not written down anywhere
        raise WeightsError(f"no U-Net could be loaded from {source}: {_first_line(error)}") from error
    heads = unet.config.num_attention_heads or unet.config.attention_head_dim  # the latter is diffusers' misnomer
    if not isinstance(heads, int):
        raise WeightsError(f"{source} has other numbers of heads at each scale ({heads}); Stable Diffusion v1 has one")
    return unet.state_dict(), heads


def load_base_unet(net: "IDM", state: State, source: str | Path) -> None:
    """Copy what Stable Diffusion's U-Net has into `net`; what `net` has beyond it keeps its values."""
    _load(list(base_names(net)), state, source, [])


def widths(unet_state: State, source: str | Path) -> tuple[int, int]:
    """block_out_channels that a U-Net's weights tell."""
    return (len(_entry(unet_state, "conv_in.weight", source)),
            len(_entry(unet_state, "down_blocks.1.resnets.0.conv1.weight", source)))


def shuffle(unet_state: State, source: str | Path) -> int:
    """How many pixels a side are folded into the input channels that a U-Net's weights tell."""
    channels = _entry(unet_state, "conv_in.weight", source).shape[1]
    side = math.isqrt(channels)
    if side**2 != channels:
        raise WeightsError(f"{source} takes {channels} channels (conv_in.weight), which are no square of pixels")
    return side


def _read_one_file(path: Path) -> State:
    """A one-file Stable Diffusion v1 checkpoint in the original layout, or a U-Net in diffusers' own."""
    if path.suffix == ".safetensors":
        try:
            with safetensors.safe_open(path, "pt") as file:
                names = list(file.keys())
                is_ldm = any(name.startswith(LDM_PREFIX) for name in names)
                state = {n: file.get_tensor(n) for n in names if not is_ldm or n.startswith(LDM_PREFIX)}
        except (OSError, safetensors.SafetensorError) as error:
            raise WeightsError(f"{path} cannot be read as safetensors: {_first_line(error)}") from error
    else:
        state = _read_pickle(path)
        state = state.get("state_dict", state) if isinstance(state, dict) else {}
        is_ldm = any(name.startswith(LDM_PREFIX) for name in state)
    return convert_ldm_unet_checkpoint(state, {"layers_per_block": 2}) if is_ldm else state


# --- common --------------------------------------------------------------------------------------------------------

def _read_pickle(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise WeightsError(f"there is no weight file {path}") from error
    except pickle.UnpicklingError as error:
        raise WeightsError(f"{path} was refused: it holds more than tensors, or is no checkpoint at all") from error
    except (OSError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise WeightsError(f"{path} cannot be read, it may be truncated: {_first_line(error)}") from error


def _entry(state: State, key: str, source: str | Path) -> Tensor:
    if key not in state:
        raise WeightsError(f"{source} holds no Stable Diffusion U-Net: key {key} is missing")
    return state[key]


@torch.no_grad()
def _load(names: list[tuple[str, nn.Parameter]], state: State, source: str | Path, problems: list[str]) -> None:
    """Copy state[name] into each parameter; nothing is copied where anything does not fit."""
    for name, parameter in names:
        if name not in state:
            problems.append(f"missing key {name}")
        elif state[name].shape != parameter.shape:
            problems.append(f"{name} is {tuple(state[name].shape)}, not {tuple(parameter.shape)}")
    if problems:
        raise WeightsError(_complaint(source, problems))
    for name, parameter in names:
        parameter.copy_(state[name])


def _complaint(source: str | Path, problems: list[str], show: int = 5) -> str:
    more = f"; and {len(problems) - show} more" if len(problems) > show else ""
    return f"{source} does not fit: {'; '.join(problems[:show])}{more}"


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
