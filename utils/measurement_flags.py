"""The flags that say what is measured, the same for every command line."""
import itertools
from argparse import ArgumentParser
from collections.abc import Callable, Mapping
from inspect import Parameter
from pathlib import Path
from typing import Any

from model.operators import OPERATORS
from utils.errors import UserError
from utils.flags import LARGEST_BLOCK, integer, noise, ratios
from utils.measurement import PUBLISHED, Measurement
from utils.operator_settings import read_settings, setting_parameters, settings_of


def add_measurement_flags(parser: ArgumentParser, ratio: Callable[[str], Any] = ratios) -> None:
    """Add --cs_ratio, read by `ratio`, --block_size, --operator, --operator_settings, --noise and --seed."""
    add = parser.add_argument
    add("--cs_ratio", type=ratio, help="M / N in (0, 1], 0.1 if not given; several as 0.1/0.3/0.5")
    add("--block_size", type=integer(1, LARGEST_BLOCK),
        help="B, 32 if not given: rows of B² pixels are measured by themselves")
    add("--operator", choices=list(OPERATORS), default="cs", help="what measures the pictures")
    settings = "; ".join(f"{name}: {settings_of(setting_parameters(name))}" for name in OPERATORS)
    add("--operator_settings", nargs="+", default=[], metavar="KEY=VALUE",
        help=f"of the operator, several values as factor=2/4; {settings}".replace("%", "%%"))
    add("--noise", type=noise, default="0", help="standard deviation of noise on the measurements, or a range as "
        "0-0.05, drawn for each picture; pictures are in [0, 1]")
    add("--seed", type=integer(0), default=2025, help="of the operators and the noise")


def measurements(
    operator: str,
    pairs: list[str],  # of --operator_settings
    cs_ratio: list[float] | None,  # of --cs_ratio, None where it was not given
    block_size: int | None,
    noise: tuple[float, float],
    seed: int,
) -> list[Measurement]:
    """Return what is to be measured, one for each ratio and each choice of settings such as factor=2/4.

    Raises UserError for flags that the operator does not take.
    """
    known = setting_parameters(operator)
    chosen = [read_settings(operator, list(own)) for own in itertools.product(*(_each(known, pair) for pair in pairs))]
    choices = {"cs_ratio": cs_ratio, "block_size": block_size and [block_size]}
    for name, values in choices.items():
        if values and name not in known:
            raise UserError(f"--{name} does not apply to the operator {operator}; {settings_of(known)}")
        if values and name in chosen[0]:
            raise UserError(f"{name} is given twice, by --{name} and by --operator_settings")
        if not values and name in known and name not in chosen[0] and known[name].default is known[name].empty:
            choices[name] = [PUBLISHED[name]]
    varied = [[(name, value) for value in values] for name, values in choices.items() if values]
    return [Measurement(operator, {**settings, **dict(flags)}, seed, noise)
            for settings in chosen for flags in itertools.product(*varied)]


def _each(known: Mapping[str, Parameter], pair: str) -> list[str]:
    """NAME=2/4 as NAME=2 and NAME=4; what may be a path is left as it is."""
    name, equals, text = pair.partition("=")
    if name not in known or known[name].annotation in (str, Path):
        return [pair]
    return [f"{name}{equals}{value}" for value in dict.fromkeys(text.split("/"))]
