"""What is measured of an image, y = A x + σ n: the operator by its name in OPERATORS, its settings, noise and seed.

Training and evaluation draw every operator through `Measurement`.
"""
import hashlib
import inspect
import re
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.operators import OPERATORS, LinearOperator
from utils.devices import memory_suffices
from utils.errors import UserError, listed
from utils.flags import percent, run_name
from utils.operator_settings import setting_parameters, settings_of

PUBLISHED = types.MappingProxyType({"cs_ratio": 0.1, "block_size": 32})


@dataclass(frozen=True)
class Measurement:
    """How images are measured.

    Raises UserError for an operator that OPERATORS has not, and for settings that it does not take or lacks.
    """

    operator: str = "cs"
    settings: Mapping[str, Any] = field(default_factory=lambda: dict(PUBLISHED))  # of the operator; its defaults added
    seed: int = 2025  # of what is drawn once for a whole run and, with a picture's file name, of what is drawn for it
    noise: tuple[float, float] = (0.0, 0.0)  # from the first to the second, σ is drawn for each image; in units of y

    def __post_init__(self):
        known = setting_parameters(self.operator)
        if unknown := [name for name in self.settings if name not in known]:
            raise UserError(f"the operator {self.operator} has no setting {listed(unknown)}; {settings_of(known)}")
        if missing := [name for name, parameter in known.items()
                       if parameter.default is parameter.empty and name not in self.settings]:
            raise UserError(f"the operator {self.operator} needs a value of {listed(missing)}; {settings_of(known)}")
        settings = {name: self.settings.get(name, parameter.default) for name, parameter in known.items()}
        object.__setattr__(self, "settings", settings)

    def with_settings(self, **changes: Any) -> "Measurement":
        """Return the same measurement with other values of some settings of the operator."""
        return replace(self, settings={**self.settings, **changes})

    @property
    def side_multiple(self) -> int:
        """What H and W of an image must be multiples of, so that the operator can measure it."""
        return self._call("side_multiple")

    def shared(self, device: torch.device | str = "cpu", seed: int | None = None) -> dict[str, Any]:
        """Draw what serves a whole run, such as the sampling matrix; `seed` instead of `self.seed` where given."""
        settings = tuple(self._named_by("shared").items())
        with memory_suffices(f"for the operator {self.operator} with {self.described}"):
            drawn = _shared(OPERATORS[self.operator], self.seed if seed is None else seed, settings)
            return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in drawn.items()}

    def draw(self, image_shape: tuple[int, int], generator: torch.Generator,
             shared: Mapping[str, Any] | None = None) -> LinearOperator:
        """Draw an operator for images of (H, W); all but what is in `shared`, which `shared()` returned.

        Raises UserError where the operator refuses its settings or the shape, or is for images that pictures are not.
        """
        operator = self._call("random", image_shape=tuple(image_shape), generator=generator,
                              **(self.shared() if shared is None else shared))
        if (channels := getattr(operator, "channels", 1)) != 1:
            raise UserError(f"the operator {self.operator} with {self.described} measures images of {channels} "
                            "channels, but pictures are measured in one, their luminance")
        return operator

    def draw_for(self, files: Sequence[str], image_shape: tuple[int, int],
                 shared: Mapping[str, Any] | None = None) -> LinearOperator:
        """Draw the operator that measures a batch of pictures, image i from the seed and files[i] alone."""
        shared = self.shared() if shared is None else shared
        drawn = [self.draw(image_shape, self.generator(file), shared) for file in files]
        return drawn[0] if len(drawn) == 1 else OPERATORS[self.operator].stacked(drawn)

    def generator(self, *key: str) -> torch.Generator:
        """Return the generator of the seed and these words: a picture's file name, and what is drawn for it."""
        digest = hashlib.sha256(":".join((str(self.seed), *key)).encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))

    def add_noise(
        self,
        y: Tensor,  # A x, image after image along the first dimension
        generators: Sequence[torch.Generator],  # one for each image; several may be the same one
    ) -> tuple[Tensor, Tensor | None]:
        """Return y + σ n and σ (batch,), drawn for each image; y and None where there is no noise.

        Of complex measurements the real and the imaginary part get noise of standard deviation σ each.
        """
        low, high = self.noise
        if high == 0:
            return y, None
        parts = torch.view_as_real(y) if y.is_complex() else y
        levels, added = [], []
        for _, generator in zip(y, generators, strict=True):
            levels.append(low + (high - low) * float(torch.rand((), generator=generator)))
            added.append(levels[-1] * torch.randn(parts.shape[1:], generator=generator))
        parts = parts + torch.stack(added).to(parts.device, parts.dtype)
        return (torch.view_as_complex(parts) if y.is_complex() else parts), torch.tensor(levels, device=y.device)

    @property
    def described(self) -> str:
        """The settings as a user gives them: cs_ratio=0.1 block_size=32."""
        return " ".join(f"{name}={value}" for name, value in self._telling().items())

    @property
    def title(self) -> str:
        """The measurement in a table: 10 %, or inpainting keep=0.5, and the noise."""
        low, high = self.noise
        what = f"{self.operator} {self.described}"
        if self.operator == "cs":
            what = f"{percent(self.settings['cs_ratio'])} %"
        level = f"{high:g}" if low == high else f"{low:g} to {high:g}"
        return f"{what}, noise {level}" if high > 0 else what

    @property
    def name(self) -> str:
        """Name of a folder of results: 10 at a ratio of 10 % of cs, as published; inpainting_keep_0.5 of others."""
        if self.operator == "cs":
            return percent(self.settings["cs_ratio"]) + self._suffix()
        return self.operator + self._suffix()

    def run_name(self, step_number: int) -> str:
        """Name of a folder of weights: R_0.10_T_3_B_32 for cs, as published; inpainting_keep_0.5_T_3 for others."""
        if self.operator == "cs":
            published = run_name([self.settings["cs_ratio"]], step_number, self.settings["block_size"])
            return published + self._suffix()
        return f"{self.operator}{self._suffix()}_T_{step_number}"

    def _telling(self) -> dict[str, Any]:
        """The settings that tell a measurement from others: what differs from its default, and the first.

        The first is left out at its default where a file is named, such as a mask, in place of what would be drawn.
        """
        known = setting_parameters(self.operator)
        drawn = not any(isinstance(value, Path) for value in self.settings.values())
        return {name: value for number, (name, value) in enumerate(self.settings.items())
                if value is not None and (number == 0 and drawn or value != known[name].default)}

    def _suffix(self) -> str:
        """Settings and noise as a part of a file's name; of cs no setting that is published."""
        words = [f"{name}_{_written(value)}" for name, value in self._telling().items()
                 if self.operator != "cs" or name not in PUBLISHED]
        low, high = self.noise
        if high > 0:
            words.append(f"noise_{high:.10g}" if low == high else f"noise_{low:.10g}-{high:.10g}")
        return "".join("_" + re.sub(r"[^\w.+-]+", "-", word) for word in words)

    def _named_by(self, method: str) -> dict[str, Any]:
        """The settings that a method of the operator's class takes."""
        taken = inspect.signature(getattr(OPERATORS[self.operator], method)).parameters
        return {name: value for name, value in self.settings.items() if name in taken}

    def _call(self, method: str, **arguments: Any) -> Any:
        try:
            return getattr(OPERATORS[self.operator], method)(**self._named_by(method), **arguments)
        except ValueError as error:
            raise UserError(f"the operator {self.operator} with {self.described}: {error}") from error


@lru_cache(maxsize=2)
def _shared(operator: type[LinearOperator], seed: int, settings: tuple[tuple[str, Any], ...]) -> dict[str, Any]:
    return operator.shared(generator=torch.Generator().manual_seed(seed), **dict(settings))


def _written(value: Any) -> str:
    """A setting in a name: of a file the stem."""
    if isinstance(value, Path):
        return value.stem
    return f"{value:.10g}" if isinstance(value, float) else str(value)
