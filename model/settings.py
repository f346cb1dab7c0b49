"""What the arguments of IDM mean, and which are refused; they are its config, in config.json under these names."""
from collections.abc import Mapping
from typing import Any

from torch import nn

from .couplings import COUPLINGS
from .schedules import SCHEDULES
from .unet import Scale


def scales(config: Mapping[str, Any]) -> tuple[Scale, Scale]:
    """The U-Net's narrow and wide scale.

    Raises:
        ValueError: for widths that the group norms or the heads do not allow, and for a coupling that is not known.
    """
    _check_architecture(config)
    factors = config["shuffle"], 2 * config["shuffle"]
    attention, windows = for_both(config["attention"], "attention"), window_pair(config["attention_window"])
    narrow, wide = (
        Scale(channels, factor, config["num_steps"], config["num_attention_heads"], config["norm_groups"], *of_scale,
              coupling=coupling_of(config), in_channels=config["in_channels"])
        for channels, factor, *of_scale in zip(config["block_out_channels"], factors, attention, windows, strict=True))
    return narrow, wide


def coupling_of(config: Mapping[str, Any]) -> type[nn.Module]:
    return _named("coupling", config["coupling"], COUPLINGS)


def schedule_of(config: Mapping[str, Any]) -> nn.Module:
    """Raises ValueError for a schedule that is not known, or has other settings."""
    schedule, settings = _named("schedule", config["schedule"], SCHEDULES), config["schedule_settings"] or {}
    try:
        return schedule(config["num_steps"], **settings)
    except TypeError as error:
        raise ValueError(f"the schedule {config['schedule']!r} cannot have the settings {settings}: {error}") from error


def window_pair(window: Any) -> tuple[int | None, int | None]:
    """Sides of the windows of both scales; raises ValueError unless each is None or at least 1."""
    windows = for_both(window, "attention_window")
    for side in windows:
        if side is not None and (not isinstance(side, int) or side < 1):
            raise ValueError(f"attention_window must be None or at least 1, or two of these, not {window!r}")
    return windows


def for_both(value: Any, name: str) -> tuple[Any, Any]:
    """One value for each scale, of two or of one for both."""
    if not isinstance(value, list | tuple):
        return value, value
    if len(value) != 2:
        raise ValueError(f"{name} must be one value or two, one for each scale, not {value!r}")
    return tuple(value)


def _named(kind: str, name: str, known: dict[str, type[nn.Module]]) -> type[nn.Module]:
    if name not in known:
        raise ValueError(f"{kind} must be one of {', '.join(known)}, not {name!r}")
    return known[name]


def _check_architecture(config: Mapping[str, Any]) -> None:
    widths, heads, groups = (config[key] for key in ("block_out_channels", "num_attention_heads", "norm_groups"))
    if len(widths) != 2:
        raise ValueError(f"block_out_channels must be two widths, not {tuple(widths)}")
    if groups < 1 or heads < 1:
        raise ValueError(f"norm_groups and num_attention_heads must be at least 1, not {groups} and {heads}")
    halves = getattr(coupling_of(config), "bodies", 1) == 2
    for width in widths:
        if width < 1 or width % groups or width % heads:
            raise ValueError(f"widths must be multiples of the {groups} groups and of the {heads} heads, not {width}")
        if halves and (width % (2 * groups) or width % (2 * heads)):
            raise ValueError(f"half of {width}, on which the coupling {config['coupling']!r} works, is no multiple of "
                             f"the {groups} groups and of the {heads} heads")
    for key in ("num_steps", "shuffle", "in_channels"):
        if config[key] < 1:
            raise ValueError(f"{key} must be at least 1, not {config[key]}")
