"""Which weights a command line means, and loading them."""
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from utils.devices import memory_suffices
from utils.errors import UserError, listed
from utils.measurement import Measurement

if TYPE_CHECKING:
    from model import IDM

PUBLISHED_EPOCH = 50  # of the files that the authors give away
BESIDE = Path(__file__).resolve().parents[1] / "weight"  # the folder that comes with the programs
TUNED = ("inpainting", "super_resolution", "mri", "ct")  # what the weights in weight/operators were trained for


def weight_folders() -> list[Path]:
    """Return where weights are looked for unless a flag says where."""
    return [Path("weight"), BESIDE]


@dataclass(frozen=True)
class WeightFlags:
    """What the flags say about weights."""

    weights: Path | None = None  # a file or a folder; nothing else is looked for
    model_dir: Path | None = None  # where to look; if not given, in weight, here or beside the programs
    epoch: int | None = None  # of the file to load
    step_number: int | None = None  # T of the weights to look for, 3 if not given; of those named, how many to take

    def find(self, measurement: Measurement) -> Path:
        """Return the path of what --weights names; else of the published file of this measurement, else of the folder
        that train.py leaves, else of the small weights that come along.

        Raises UserError where there is nothing, or an epoch is asked for that is not there.
        """
        if self.weights is not None:
            if not self.weights.exists():
                raise UserError(f"--weights names {self.weights}, which does not exist")
            return self.weights
        folders = [self.model_dir] if self.model_dir else weight_folders()
        steps = self.step_number or 3
        name = measurement.run_name(steps)
        quiet = replace(measurement, noise=(0.0, 0.0)).run_name(steps)
        for run in dict.fromkeys(folder / each for each in (name, quiet) for folder in folders):
            if found := self._in_run(run):
                return found
        small = [folder / each for folder in folders for each in small_weights(measurement)]
        if found := [path for path in small if path.exists()]:
            return found[0]
        raise UserError(f"there are no weights for {measurement.title}, neither {folders[0] / name / self.file} nor "
                        f"{folders[0] / 'compact'}; train them with train.py, or name others with --weights")

    @property
    def file(self) -> str:
        return f"net_params_{PUBLISHED_EPOCH if self.epoch is None else self.epoch}.pkl"

    def _in_run(self, folder: Path) -> Path | None:
        """What to load from the folder of a run; other epochs' files are never taken unasked."""
        published, newest = folder / self.file, folder / "pretrained"
        if os.path.lexists(published):  # a link to nothing is not the same as nothing: loading it will say so
            return published
        others = sorted(path.name for path in folder.glob("net_params_*.pkl"))
        if os.path.lexists(newest) and (self.epoch is None or not others):
            return newest
        if others:
            raise UserError(f"{folder} holds {listed(others)}, but not {self.file}; choose an --epoch")
        return None

    def load(self, path: Path, device: torch.device) -> "IDM":
        """Return the network of these weights on the device; raises WeightsError and UserError."""
        net = load_network(path, device)
        if self._shortens(net):
            net.default_steps = self.step_number
        return net

    def _shortens(self, net: "IDM") -> bool:
        """Whether fewer steps are asked for than the weights that are named by their path have."""
        return self.weights is not None and self.step_number is not None and self.step_number < net.config.num_steps

    def described(self, net: "IDM") -> str:
        """Return what the first line says of the network."""
        return f"T = {net.config.num_steps}"

    def notes(self, path: Path, net: "IDM", measurement: Measurement) -> list[str]:
        """Return what is to be said of the weights that were loaded from `path`: flags that do not apply to them."""
        notes, steps = [], net.config.num_steps
        if self.weights is None and path.name == "compact" and measurement.operator != "cs":
            notes.append(f"there are no weights for {measurement.name} in {path.parent}; these were trained for cs")
        if self._shortens(net):
            notes.append(f"of these weights' T = {steps} steps the last {self.step_number} are taken, as is meant for "
                         "weights trained with --random_steps")
        elif self.step_number not in (None, steps):
            notes.append(f"these weights are for T = {steps}; --step_number {self.step_number} does not apply")
        if self.epoch is not None and path.name != self.file:
            why = "--weights names them" if self.weights else "these weights are the only ones there"
            notes.append(f"{why}; --epoch {self.epoch} does not apply")
        return notes


def small_weights(measurement: Measurement) -> list[str]:
    """Return the folders of the weights that come along, those first that were trained for the most alike."""
    tuned = ["operators"] if measurement.operator in TUNED else ["noisy"] * (max(measurement.noise) > 0)
    return [*tuned, "compact"]


def check_channels(net: "IDM", source: str | Path) -> None:
    """Raise UserError unless a network, which came from `source`, is for images of one channel."""
    if net.config.in_channels != 1:
        raise UserError(f"the network of {source} is for images of {net.config.in_channels} channels, but pictures are "
                        "measured in one, their luminance")


def load_network(path: Path, device: torch.device) -> "IDM":
    """Return the network of these weights on the device, ready to reconstruct; raises WeightsError and UserError."""
    from model import IDM  # takes seconds, which a mistake in the flags need not wait for

    net = IDM.from_checkpoint(path).eval()
    check_channels(net, path)
    with memory_suffices(f"for the network on {device}; choose another --device"):
        if device.type == "cpu":  # where channels last make the compact network a quarter slower
            return net
        return net.to(device, memory_format=torch.channels_last)  # what GPUs' convolutions take in half precision
