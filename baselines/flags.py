"""The flags of test.py --method ddnm, and loading what they name."""
from argparse import ArgumentParser, Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from baselines.ddnm import Sampling
from utils.devices import memory_suffices
from utils.errors import UserError
from utils.measurement import Measurement
from utils.weights import weight_folders

if TYPE_CHECKING:
    from baselines.ddpm import DDNM

SETTINGS = {"sampling_steps": "steps", "eta": "eta", "travel_length": "travel_length",
            "travel_repeat": "travel_repeat"}  # flag: name in `Sampling`
OF_IDM = ("model_dir", "epoch", "compile", "attention_window")


def add_ddnm_flags(parser: ArgumentParser) -> None:
    """Add --method and the settings of DDNM, none of which has a default here: whoever gives one means it."""
    add, default = parser.add_argument, Sampling()
    add("--method", choices=("idm", "ddnm"), default="idm",
        help="ddnm: zero-shot, by an unconditional diffusion model; --weights is then a folder or a hub id of a DDPM "
             "pipeline of diffusers; if not given, the small one that comes along")
    add("--sampling_steps", type=int, help=f"ddnm: evaluations of the network; {default.steps} if not given")
    add("--eta", type=float, help=f"ddnm: share of the noise drawn anew at each step; {default.eta} if not given")
    add("--travel_length", type=int, help="ddnm: steps that a time travel goes back; 1 if not given")
    add("--travel_repeat", type=int, help="ddnm: times that each stretch is walked; 1, no time travel, if not given")


def refuse_ddnm_flags(args: Namespace) -> None:
    """Raise UserError where a setting of DDNM was given for another method."""
    if given := [f"--{flag}" for flag in SETTINGS if getattr(args, flag) is not None]:
        raise UserError(f"{given[0]} is a setting of --method ddnm, and this is --method {args.method}")


@dataclass(frozen=True)
class DdnmFlags:
    """What the flags say about DDNM: for test.py what `WeightFlags` is for IDM."""

    source: Path  # a folder, or a hub id
    sampling: Sampling
    seed: int

    @classmethod
    def of(cls, args: Namespace) -> "DdnmFlags":
        """Read the flags; raises UserError for impossible ones, and those of IDM."""
        if given := [f"--{flag}" for flag in OF_IDM if getattr(args, flag)]:
            raise UserError(f"{given[0]} does not apply to --method ddnm")
        given = {name: getattr(args, flag) for flag, name in SETTINGS.items() if getattr(args, flag) is not None}
        try:
            sampling = Sampling(**given)
        except ValueError as error:
            raise UserError(f"--method ddnm: {error}") from error
        small = [folder / "ddpm" for folder in weight_folders()]  # the one that comes along
        found = [args.weights] if args.weights else [path for path in small if path.exists()]
        if not found:
            raise UserError(f"there is no DDPM in {small[0]}; name one with --weights: a folder or a hub id of a "
                            "pipeline of diffusers, such as python -m baselines.train writes")
        return cls(found[0], sampling, args.seed)

    def find(self, measurement: Measurement) -> Path:
        """Return what to load: one DDPM serves all measurements."""
        return self.source

    def load(self, path: Path, device: torch.device) -> "DDNM":
        """Return DDNM on the device; raises UserError where the DDPM cannot be loaded or serve."""
        from baselines.ddpm import DDNM  # takes seconds, which a mistake in the flags need not wait for

        net = DDNM.from_pretrained(path, self.sampling, self.seed).eval()
        with memory_suffices(f"for the network on {device}; choose another --device"):
            return net.to(device)

    def described(self, net: "DDNM") -> str:
        """Return the settings for the first line."""
        sampling, travel = self.sampling, ""
        if sampling.travel_repeat > 1:
            travel = f", time travel {sampling.travel_length} x {sampling.travel_repeat}"
        return f"DDNM of {sampling.steps} steps, eta = {sampling.eta:g}{travel}"

    def notes(self, path: Path, net: "DDNM", measurement: Measurement) -> list[str]:
        return []
