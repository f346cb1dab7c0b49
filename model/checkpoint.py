"""Weights in and out: the published format, our own folders, and Stable Diffusion base models.

The published format is a pickled state_dict that holds every module of a chain twice, under its own name and under the
chain's: unet.down_blocks.0.resnets.1.… and unet.down_blocks.0.rev_module_lists.1.0.body.… are the same numbers.
"""
import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .injector import Injector
from .reversible import ReversibleChain
from .settings import for_both
from .unet import Attention, DownBlock, Residual, Resnet, UpBlock, bodies_of
from .weight_files import (
    State,
    WeightsError,
    fetch_unet,
    first_line,
    is_plain,
    read_config,
    read_sharded,
    read_tensors,
    shards,
    snapshot,
    weight_files,
)

if TYPE_CHECKING:
    from .idm import IDM

DEFAULT_HEADS = 8  # neither attention heads nor groups leave a trace in the weights; these are Stable Diffusion v1.5's
NORM_GROUPS = 32
OFFICIAL_SETTINGS = {  # that a published checkpoint does not tell
    "num_attention_heads": DEFAULT_HEADS, "norm_groups": NORM_GROUPS, "coupling": "weighted", "schedule": "learned",
    "attention": (True, True), "attention_window": (None, None), "in_channels": 1}

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
    unet = net.unet
    for name in ("conv_in", "conv_norm_out", "conv_out"):
        yield from _under(name, getattr(unet, name))
    blocks = {f"down_blocks.{i}": block for i, block in enumerate(unet.down_blocks)}
    blocks |= {f"up_blocks.{i + 2}": block for i, block in enumerate(unet.up_blocks)}  # the last two of four
    for prefix, block in blocks.items():
        yield from ((name, parameter) for name, parameter in _block_names(prefix, block) if "injectors" not in name)


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
    bodies = [block.entry, *(body.body if isinstance(body, Residual) else body
                             for chain in chains for coupling in chain for body in bodies_of(coupling))]

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
    """Return the state_dict of a published checkpoint; the unpickler runs no code."""
    state = read_tensors(path)
    if not all(isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items()):
        raise WeightsError(f"{path} holds no state_dict: a published checkpoint is a dictionary of tensors")
    return state


def build_official(cls: type["IDM"], path: Path) -> "IDM":
    """Return the network that a published checkpoint holds; what its shapes do not tell is as published."""
    state = read_official(path)
    net = _without_values(cls, official_config(state, path), state, path)
    load_official(net, state, path)
    return net.eval()


def official_config(state: State, path: Path) -> dict[str, Any]:
    """Return the arguments of IDM that a published checkpoint's shapes tell."""
    alpha = _entry(state, "alpha", 1, path)
    if len(alpha) == 0:
        raise WeightsError(f"{path} does not fit: alpha is (0,), but there is at least one sampling step")
    return {
        "block_out_channels": widths(state, path, "unet."),
        "num_steps": len(alpha),
        "shuffle": shuffle(state, path, "unet."),
        "num_attention_heads": DEFAULT_HEADS,
        "norm_groups": NORM_GROUPS,
    }


def unofficial_settings(config: Mapping[str, Any]) -> str:
    """Return which settings the published format means, and those of `config`; empty where they are the same."""
    differences = []
    for name, published in OFFICIAL_SETTINGS.items():
        own = for_both(config[name], name) if isinstance(published, tuple) else config[name]
        if own != published:
            differences.append(f"{name} {published}, not {own}")
    return ", ".join(differences)


def load_official(net: "IDM", state: State, source: str | Path) -> None:
    """Copy a published state_dict into `net`; raises WeightsError naming what does not fit, and then copies nothing."""
    _load(net, official_names, state, source)


# --- our own folders -----------------------------------------------------------------------------------------------

def meant(path: Path) -> Path:
    """Return the folder of `save_pretrained` that is meant by a file in it, a run's folder around it, or a hub's."""
    if path.name.startswith("diffusion_pytorch_model.") and (path.parent / "config.json").is_file():
        return path.parent
    path = snapshot(path)
    return path / "pretrained" if (path / "pretrained").is_dir() else path


def read_pretrained(cls: type["IDM"], folder: Path, file: Path | None = None) -> "IDM":
    """Do what `from_pretrained` does with a local folder, but raise WeightsError where that would fill in numbers.

    Of several sets of weights in the folder the best is taken, or the one that begins with `file`.
    """
    config = read_config(folder, cls.__name__)
    files = weight_files(folder) if file is None else [folder / shard for shard in shards(file)] or [file]
    state = read_sharded(files)
    net = _without_values(cls, config, state, f"{folder}/config.json")

    def names(net: "IDM") -> Iterator[tuple[str, Tensor]]:
        for name, tensor in net.state_dict(keep_vars=True).items():
            if name in state or name != "log_damping":  # weights older than the damping mean its initial values
                yield name, tensor

    if {name for name, _ in net.named_buffers()} - net.state_dict().keys():  # to which only building gives values
        _check(list(names(net)), state, folder)
        net = build(cls, config, folder)
    _load(net, names, state, folder)
    return net.eval()


def build(cls: type["IDM"], config: Mapping[str, Any], source: str | Path) -> "IDM":
    """Return the network that a config describes, with fresh weights.

    A setting that this version does not know is refused: without it the network would not be what was trained.

    Raises:
        WeightsError: that names the config's source.
    """
    config = {name: value for name, value in config.items() if not name.startswith("_")}
    if unknown := config.keys() - inspect.signature(cls.__init__).parameters.keys():
        raise WeightsError(f"{source} describes no {cls.__name__} of this version, which does not know "
                           f"{', '.join(sorted(map(str, unknown)))}")
    try:
        return cls(**config)
    except (ValueError, TypeError, RuntimeError, ArithmeticError) as error:  # RuntimeError: sizes that overflow
        raise WeightsError(f"{source} describes no {cls.__name__}: {first_line(error)}") from error


# --- base models ---------------------------------------------------------------------------------------------------

def build_on_unet(cls: type["IDM"], source: str | Path, num_steps: int, **others: Any) -> "IDM":
    """Return a network that has what Stable Diffusion's U-Net has; what is beyond it has its initial values.

    Args:
        source: a local folder (of a pipeline, of its U-Net, or of the hub's cache), a local file (.safetensors, or
            .ckpt and .bin, which are pickles and are read without running code), or a hub id, of which only the U-Net
            is fetched.
        num_steps: T.
        others: further arguments of `IDM`.

    Raises:
        WeightsError: where the source is missing, or holds no U-Net that an IDM can be cut from.
    """
    state, heads = read_base_unet(source)
    config = {"block_out_channels": widths(state, source), "num_steps": num_steps, "shuffle": shuffle(state, source),
              "num_attention_heads": heads, **others}
    with torch.device("meta"):
        names = list(base_names(cls(**config)))
    state = {name: state[name] for name, _ in names if name in state}  # of what is cut away, nothing is asked
    _check(names, state, source)  # before any memory is asked for
    net = cls(**config)
    _load(net, base_names, state, source)
    return net


def read_base_unet(source: str | Path) -> tuple[State, int]:
    """Return the state_dict of a Stable Diffusion U-Net under diffusers' names, and its number of attention heads."""
    path = Path(source)
    if path.exists() and not path.is_dir():
        return read_tensors(path), DEFAULT_HEADS
    folder = snapshot(path) if path.is_dir() else fetch_unet(str(source))
    folder = folder / "unet" if (folder / "unet").is_dir() else folder
    config = read_config(folder, "UNet2DConditionModel")
    for key, value in {"layers_per_block": 2, "norm_num_groups": NORM_GROUPS, "act_fn": "silu"}.items():
        if config.get(key, value) != value:  # all are diffusers' defaults; the last two leave no trace in the shapes
            raise WeightsError(f"{source} does not fit: its {key} is {config[key]}, not {value}")
    heads = config.get("num_attention_heads") or config.get("attention_head_dim", 8)  # the latter: diffusers' misnomer
    if not isinstance(heads, int):
        raise WeightsError(f"{source} does not fit: its scales have different numbers of attention heads ({heads}), "
                           "as Stable Diffusion 2 has; an IDM is built on Stable Diffusion v1, which has one number")
    state = read_sharded(weight_files(folder))
    if heads < 1 or any(width % heads for width in widths(state, source)):
        raise WeightsError(f"{source} does not fit: {heads} attention heads do not divide its widths")
    return state, heads


def widths(state: State, source: str | Path, prefix: str = "") -> tuple[int, int]:
    """block_out_channels that a U-Net's weights tell."""
    keys = [prefix + "conv_in.weight", prefix + "down_blocks.1.resnets.0.conv1.weight"]
    narrow, wide = (len(_entry(state, key, 4, source)) for key in keys)
    for key, width in zip(keys, (narrow, wide), strict=True):
        if width < 1 or width % NORM_GROUPS:
            raise WeightsError(f"{source} does not fit: {key} gives {width} channels, no multiple of {NORM_GROUPS}")
    return narrow, wide


def shuffle(state: State, source: str | Path, prefix: str = "") -> int:
    """How many pixels a side are folded into the input channels that a U-Net's weights tell."""
    taken = _entry(state, f"{prefix}conv_in.weight", 4, source).shape[1]
    given = len(_entry(state, f"{prefix}conv_out.weight", 4, source))
    side = math.isqrt(taken)
    narrow, wide = widths(state, source, prefix)
    if taken != given or side < 1 or side**2 != taken or narrow % side**2 or wide % (2 * side)**2:
        raise WeightsError(f"{source} does not fit: at widths of {narrow} and {wide} it takes {taken} channels and "
                           f"gives {given}; an IDM's takes and gives a square of pixels (an inpainting model does not)")
    return side


# --- common --------------------------------------------------------------------------------------------------------

def _without_values(cls: type["IDM"], config: dict[str, Any], state: State, source: str | Path) -> "IDM":
    """Return a network whose parameters have no values, nor memory, yet; none is built that `state` cannot fill."""
    steps = config.get("num_steps")
    if isinstance(steps, int) and 4 * steps > len(state):  # two convolutions of each injector
        raise WeightsError(f"{source} does not fit: {steps} sampling steps have more weights than {len(state)} tensors")
    with torch.device("meta"):
        return build(cls, config, source)


def _entry(state: State, key: str, dimensions: int, source: str | Path) -> Tensor:
    if key not in state:
        raise WeightsError(f"{source} does not fit: missing key {key}{_whose(state, key)}")
    if not is_plain(state[key]) or state[key].ndim != dimensions:
        raise WeightsError(f"{source} does not fit: {key} is {_describe(state[key])}, not of {dimensions} dimensions")
    return state[key]


def _whose(state: State, asked: str) -> str:
    """Return what the weights are that lack the key asked for, and who reads them; empty where that is not known."""
    if "input_scale" in state:
        return ("; it holds a state_dict of IDM, which does not tell its settings: use the folder that save_pretrained "
                "writes, such as train.py's folder pretrained, or load_state_dict")
    if "conv_in.weight" in state:
        return "; it holds a U-Net, on which IDM.from_unet (train.py --base_model) builds"
    if "unet.conv_in.weight" in state and asked == "conv_in.weight":
        return "; it holds weights of IDM, which IDM.from_checkpoint reads"
    return ""


def _check(names: list[tuple[str, nn.Parameter]], state: State, source: str | Path) -> None:
    """Raise WeightsError where `state` cannot be copied into the parameters, key by key."""
    problems = []  # first in the list, since the others may follow from them
    for name, parameter in names:
        if name not in state:
            continue
        if not is_plain(state[name]):
            problems.append(f"{name} holds no plain floating-point numbers ({_describe(state[name])})")
        elif state[name].shape != parameter.shape:
            problems.append(f"{name} is {_describe(state[name])}, not {tuple(parameter.shape)}")
    known = dict(names)
    problems += [f"missing key {name}" for name in known if name not in state]
    problems += [f"unexpected key {name}" for name in state if name not in known]
    if not problems:
        first_names: dict[nn.Parameter, str] = {}
        for name, parameter in names:
            first = first_names.setdefault(parameter, name)
            if not _same(state[name], state[first]):
                problems.append(f"{name} differs from {first}, though they are one parameter")
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise WeightsError(f"{source} does not fit: {'; '.join(problems[:5])}{more}")


def _describe(value: Any) -> str:
    if is_plain(value):
        return str(tuple(value.shape))
    if isinstance(value, Tensor):
        return f"{value.dtype}, {value.layout}, {value.device}"
    return f"a {type(value).__name__}"


def _same(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors hold the same bits; NaN among them, which a diverged training saves, is no damage."""
    return a is b or torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


@torch.no_grad()
def _load(net: "IDM", names: Callable[["IDM"], Iterable[tuple[str, Tensor]]], state: State,
          source: str | Path) -> None:
    """Copy state[name] into each tensor; where anything does not fit, nothing is copied, nor memory asked for."""
    _check(list(names(net)), state, source)
    if any(parameter.is_meta for parameter in net.parameters()):
        net.to_empty(device="cpu").reset_damping()  # of which the published format has none
    for name, parameter in names(net):
        parameter.copy_(state[name])
