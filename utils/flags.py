"""What the flags of both command lines have in common: types, names, and mistakes that are one sentence."""
import argparse
import re
from collections.abc import Callable, Iterable
from pathlib import Path

from utils.errors import UserError

LARGEST_BLOCK = 1024  # pixels; its matrix has up to 10^12 numbers, more than fit anywhere


class Parser(argparse.ArgumentParser):
    """argparse's parser; help tells defaults, and complaints are a UserError instead of a page about all flags."""

    def __init__(self, description: str, **settings):
        super().__init__(description=description, **{"formatter_class": _Formatter, **settings})

    def error(self, message: str):
        raise UserError(f"{message}; --help lists the flags")


class _Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Tells a flag's default where it is a value; of others the help itself says what holds without them."""

    def _get_help_string(self, action: argparse.Action) -> str:
        silent = action.default is False or action.default in (None, [], ())
        return action.help if silent else super()._get_help_string(action)


def integer(least: int, most: int | None = None) -> Callable[[str], int]:
    """The type of a flag whose values are whole numbers from `least` on, up to `most`."""
    def parse(text: str) -> int:
        if not re.fullmatch(r"\d{1,18}", text) or int(text) < least:
            raise argparse.ArgumentTypeError(f"must be a whole number of at least {least}, not {text}")
        if most is not None and int(text) > most:
            raise argparse.ArgumentTypeError(f"must be at most {most}, not {text}")
        return int(text)
    return parse


def positive(text: str) -> float:
    """The type of a flag whose values are finite numbers above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number above 0, not {text}")
    return value


def several(choices: Iterable[str]) -> Callable[[str], list[str]]:
    """The type of a flag whose value is one of some names or several of them, as lpips,fid."""
    def parse(text: str) -> list[str]:
        values, known = [part.strip().lower() for part in re.split("[/,]", text)], list(choices)
        if not all(value in known for value in values):
            raise argparse.ArgumentTypeError(f"must be one or several of {', '.join(known)}, not {text}")
        return list(dict.fromkeys(values))
    return parse


def file_path(text: str) -> Path:
    """The type of a flag that names a folder, or a file: an unset variable of the shell's is neither."""
    if not text:
        raise argparse.ArgumentTypeError("must not be empty; the current folder is .")
    try:
        return Path(text).expanduser()  # which a shell does not do behind --flag=
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"names the home of a user who is not here: {text}") from None


def ratios(text: str) -> list[float]:
    """The type of --cs_ratio: one ratio M/N in (0, 1], or several, each once and in the order given."""
    try:
        values = [float(part) for part in re.split("[/,]", text)]
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number, or several as 0.1/0.3/0.5, not {text}") from None
    for value in values:
        if not 0 < value <= 1:
            instead = f"; {value:g} % is {value / 100:g}" if 1 < value <= 100 else ""
            raise argparse.ArgumentTypeError(f"must lie in (0, 1], not {value:g}{instead}")
    return list(dict.fromkeys(values))


def noise(text: str) -> tuple[float, float]:
    """The type of --noise: a standard deviation, or a range as 0-0.05 from which one is drawn for each image."""
    found = re.fullmatch(r"(\d*\.?\d+(?:e-?\d+)?)(?:-(\d*\.?\d+(?:e-?\d+)?))?", text.strip())
    low, high = (float(found[1]), float(found[2] or found[1])) if found else (1.0, 0.0)
    if not low <= high < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a standard deviation, or a range as 0-0.05, not {text}")
    return low, high


def percent(cs_ratio: float) -> str:
    """A ratio as people say it, and as test.py names its folders: 10 for 0.1."""
    return f"{100 * cs_ratio:.10g}"


def run_name(cs_ratio: list[float], step_number: int, block_size: int, between: str = "-") -> str:
    """Of a folder of weights, as published: R_0.10_T_3_B_32; of several ratios, with `between` between them.

    A ratio that two decimals do not hold is written in full, so that it never passes for another one.
    """
    parts = (f"{ratio:.2f}" if round(ratio, 2) == ratio else f"{ratio:.10g}" for ratio in cs_ratio)
    return f"R_{between.join(parts)}_T_{step_number}_B_{block_size}"
