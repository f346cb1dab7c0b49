"""How the flags of train.py are read: their types, and a field of the settings for each."""
import argparse
import re
from dataclasses import dataclass, field
from typing import Any

import torch

from model.operators import OPERATORS
from utils.flags import positive, ratios, run_name, several

PAPER_RATIOS = (0.1, 0.3, 0.5)  # that the paper reports


@dataclass(frozen=True)
class Ratios:
    """What the ratio of a batch is drawn from: the numbers listed, or all from the first to the second."""

    values: tuple[float, ...]
    is_range: bool = False

    def __str__(self) -> str:
        return (" to " if self.is_range else " / ").join(f"{value:.10g}" for value in self.values)

    def draw(self, generator: torch.Generator) -> float:
        if self.is_range:
            low, high = self.values
            return low + (high - low) * float(torch.rand((), generator=generator))
        return self.values[int(torch.randint(len(self.values), (), generator=generator))]

    @property
    def to_test(self) -> list[float]:
        """All that are listed; of a range, those that the paper reports, or its ends where it holds none of them."""
        if not self.is_range:
            return list(self.values)
        return [value for value in PAPER_RATIOS if self.values[0] <= value <= self.values[1]] or list(self.values)

    def run_name(self, step_number: int, block_size: int) -> str:
        return run_name(list(self.values), step_number, block_size, "to" if self.is_range else "-")


def training_ratios(text: str) -> Ratios:
    """The type of --cs_ratio: 0.1, or several as 0.1/0.3/0.5, or a range as 0.05-0.5."""
    ends = re.fullmatch(r"([\d.]+)-([\d.]+)", text.strip())
    if not ends:
        return Ratios(tuple(sorted(ratios(text))))
    low, high = (ratios(end)[0] for end in ends.groups())
    if not low < high:
        raise argparse.ArgumentTypeError(f"the range {text} must go from a lower ratio to a higher one")
    return Ratios((low, high), is_range=True)


def decay(text: str) -> float:
    """The type of a flag whose values lie in (0, 1)."""
    value = positive(text)
    if value >= 1:
        raise argparse.ArgumentTypeError(f"must be a number below 1, not {text}")
    return value


def setting(text: str) -> tuple[str, int | float]:
    """The type of --schedule_settings: key=number."""
    found = re.fullmatch(r"(\w+)=(-?[\d.]+(?:e-?\d+)?)", text)
    try:
        return found[1], int(found[2]) if re.fullmatch(r"-?\d+", found[2]) else float(found[2])
    except (TypeError, ValueError):  # no match, or not quite a number
        raise argparse.ArgumentTypeError(f"must be key=number, not {text}") from None


def operators(text: str) -> tuple[str, ...]:
    """The type of --operator: a name in OPERATORS, or several as cs,inpainting."""
    return tuple(several(OPERATORS)(text))


def flag(
    default: Any,
    help: str,
    *,
    shown: str | None = None,  # the default as a user would give it, where that is not its own text
    of_machine: bool = False,  # processes on other machines may have another value
    decides: bool = True,  # what the weights will be: a run goes on only with the same value
    **how: Any,  # read the flag: as of argparse's add_argument
) -> Any:
    """Return a field of `Settings` with what its flag is made of."""
    return field(default=default, metadata={"of_machine": of_machine, "decides": decides and not of_machine,
                                            "flag": {"default": shown or default, "help": help, **how}})
