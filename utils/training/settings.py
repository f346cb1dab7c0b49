"""The settings of a training run: each a flag of train.py, the published ones under their names and defaults."""
import argparse
import os
from collections.abc import Sequence
from dataclasses import Field, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from model.couplings import COUPLINGS
from model.operators import OPERATORS
from model.schedules import SCHEDULES
from utils.devices import PRECISIONS
from utils.errors import UserError, listed
from utils.flags import LARGEST_BLOCK, Parser, file_path, integer, noise, positive, run_name
from utils.measurement import Measurement
from utils.measurement_flags import measurements
from utils.operator_settings import setting_parameters
from utils.training.flags import Ratios, decay, flag, operators, setting, training_ratios
from utils.training.losses import LOSSES

NO_TESTS = "none"  # in place of a test set
ATTENTION = {"both": (True, True), "first": (True, False), "second": (False, True), "none": (False, False)}
TEST_SEED = 2025  # of the matrix and the permutations that test.py, too, measures test sets with


def other_default(name: str, default: Any) -> Any:
    """Return the field of `Settings` of this name with another default, for a kind of training of its own."""
    metadata = Settings.__dataclass_fields__[name].metadata
    return field(default=default, metadata={**metadata, "flag": {**metadata["flag"], "default": default}})


@dataclass(frozen=True)
class Settings:
    """What a training run is told.

    --invertible and --compile do not decide what the weights will be: all their values have the same gradients but for
    rounding, and who ran out of memory may go on with "both".
    """

    without: ClassVar[frozenset[str]] = frozenset()  # settings that a kind of training derived from this one has not

    epoch: int = flag(50, "epochs to train", type=integer(1), decides=False)
    step_number: int = flag(3, "T, sampling steps", type=integer(1))
    cs_ratio: Ratios = flag(Ratios((0.1,)), "ratio M/N; 0.1/0.3/0.5 or the range 0.05-0.5 trains one model for all, "
                            "drawing one for each batch", type=training_ratios)
    block_size: int = flag(32, "B; a row of the operator measures B*B pixels", type=integer(1, LARGEST_BLOCK))
    operator: tuple[str, ...] = flag(("cs",), f"what measures the crops, of {', '.join(OPERATORS)}; of several, as "
                                     "cs,inpainting, one is drawn for each batch", shown="cs", type=operators)
    operator_settings: tuple[str, ...] = flag((), "as test.py takes them; of several operators, NAME.KEY=VALUE",
                                              nargs="+", metavar="KEY=VALUE")
    noise: tuple[float, float] = flag((0.0, 0.0), "standard deviation of noise on the measurements, or a range as "
                                      "0-0.05, drawn for each crop; pictures are in [0, 1]", shown="0", type=noise)
    random_steps: bool = flag(False, "draw the number of sampling steps of each batch from 1 to STEP_NUMBER: the "
                              "network then serves any of them", action="store_true")
    learning_rate: float = flag(1e-4, "of Adam, at the start", type=positive)
    loss: str = flag("l1", "l1: mean |x_hat - x|, as published; log_mse: mean log of each picture's mean square error, "
                     "which is PSNR", choices=LOSSES)
    lr_schedule: str | None = flag(
        None, "step: halve after epochs 10, 20, 30, 40; cosine and linear: down to 0; constant: for long runs with "
        "--ema; if not given, step, and linear with --decay_from", choices=("step", "cosine", "linear", "constant"))
    warm_up: int | None = flag(None, "iterations over which the learning rate rises from 0; if not given, none, and "
                               "2 %% of all with cosine", type=integer(0))
    batch_size: int = flag(8, "crops per process", type=integer(1))
    accumulate: int = flag(1, "batches per process that make one iteration", type=integer(1))
    patch_size: int = flag(256, "side of a crop in pixels", type=integer(1))
    clip: float | None = flag(None, "scale gradients down to this norm where theirs is larger; if not given, never",
                              type=positive)
    ema: float | None = flag(None, "test and save a running average of the weights with this decay, such as 0.999",
                             type=decay)
    iters_per_epoch: int = flag(1000, "iterations that make an epoch", type=integer(1))
    max_iters: int | None = flag(None, "stop after this many iterations in all, with a checkpoint, which a run without "
                                 "this flag replaces when that epoch is finished", type=integer(1), decides=False)
    base_model: str = flag("stable-diffusion-v1-5/stable-diffusion-v1-5", "where weights come from: a hub id, a "
                           "folder, a file, an IDM checkpoint, or 'compact' for fresh ones", type=os.path.expanduser)
    decay_from: Path | None = flag(
        None, "begin from the weights, their average and the optimizer of another run, which can go on: a state of it "
        "or its folder; the learning rate falls to 0, over crops that are new to them", type=file_path)
    width: int = flag(64, "compact: width of the first scale, a multiple of 2 * SHUFFLE**2; the second has twice as "
                      "much", type=integer(1))
    shuffle: int = flag(4, "compact: side of the pixel square folded into channels", type=integer(1))
    coupling: str | None = flag(None, "of both levels; if not given, weighted, or as the network has it",
                                choices=COUPLINGS)
    schedule: str | None = flag(None, "of the noise; if not given, learned, or as the network has it",
                                choices=SCHEDULES)
    schedule_settings: tuple[tuple[str, float], ...] = flag((), "of the schedule, e.g. scale=10 of dynamic",
                                                            type=setting, nargs="+", metavar="KEY=NUMBER")
    attention: str | None = flag(None, "scales that have it; if not given, both, or as the network has it",
                                 choices=ATTENTION)
    attention_window: int | None = flag(None, "side, in tokens, of windows within which attention works: time grows "
                                        "with the area then", type=integer(1))
    precision: str | None = flag(None, "if not given: on GPUs bf16 where they have it, else fp16; on CPUs fp32",
                                 choices=tuple(PRECISIONS))
    invertible: str | None = flag(None, "levels that keep no activations; auto is the fastest that fits the memory; if "
                                  "not given: on GPUs auto, on CPUs both",
                                  choices=("auto", "both", "sampling", "unet", "none"), decides=False)
    compile: bool = flag(False, "compile the blocks of the U-Net, which takes minutes at the start",
                         action="store_true", decides=False)
    seed: int = flag(TEST_SEED, "of the crops, operators and fresh weights; tests measure with the matrix of 2025, "
                     "which any other seed keeps out of training", type=integer(0))
    device: str | None = flag(None, "cpu, cuda or cuda:N; CUDA if there is any", of_machine=True)
    num_workers: int = flag(0, "processes that cut crops", type=integer(0), of_machine=True)
    data_dir: Path = flag(Path("data"), "folder of the test sets", type=file_path, of_machine=True)
    train_dir: Path | None = flag(None, "training pictures, searched recursively; DATA_DIR/pristine_images if not "
                                  "given", type=file_path, of_machine=True)
    cache_dir: Path | None = flag(None, "the pictures' luminance is kept here; DATA_DIR/cache if not given",
                                  type=file_path, of_machine=True)
    no_cache: bool = flag(False, "decode all pictures into memory, at every start and in every process",
                          action="store_true", decides=False)
    testset_name: str = flag("Set11", f"tested on after each epoch: a folder of DATA_DIR, or Samples; or {NO_TESTS}",
                             decides=False)
    model_dir: Path = flag(Path("weight"), "checkpoints and states go into a folder of it", type=file_path,
                           of_machine=True)
    log_dir: Path = flag(Path("log"), "logs go here", type=file_path, of_machine=True)
    save_interval: int = flag(10, "epochs between checkpoints; the last is saved always", type=integer(1),
                              decides=False)
    save_minutes: float = flag(15, "minutes between two states within an epoch", type=positive, decides=False)
    resume: bool = flag(True, "go on from the state in the run's folder, if there is one",
                        action=argparse.BooleanOptionalAction, decides=False)

    @property
    def name(self) -> str:
        """Of the run: its folder in `model_dir`, its logs."""
        steps, names, ratio = self.step_number, [], self.cs_ratio.values[0]
        for measurement in self.measured([ratio]):
            if measurement.operator == "cs":
                published = run_name([ratio], steps, self.block_size)
                names.append(self.cs_ratio.run_name(steps, self.block_size)
                             + measurement.run_name(steps).removeprefix(published))
            elif "cs_ratio" in measurement.settings:
                names.append(measurement.with_settings(cs_ratio=str(self.cs_ratio).replace(" ", "")).run_name(steps))
            else:
                names.append(measurement.run_name(steps))
        return "+".join(names)

    def measured(self, cs_ratio: Sequence[float]) -> list[Measurement]:
        """Return what is measured: by each operator, and at each of these ratios where it has a ratio.

        Raises:
            UserError: for settings that an operator does not take.
        """
        found = []
        for operator in self.operator:
            known, own = setting_parameters(operator), self.operator_settings
            if len(self.operator) > 1:
                own = [pair.removeprefix(f"{operator}.") for pair in own if pair.startswith(f"{operator}.")]
            found += measurements(operator, list(own), list(cs_ratio) if "cs_ratio" in known else None,
                                  self.block_size if "block_size" in known else None, self.noise, TEST_SEED)
        return found

    def tested(self) -> list[Measurement]:
        """Return what is measured in the tests after each epoch."""
        return self.measured(self.cs_ratio.to_test)

    def network(self) -> dict[str, Any]:
        """Return the arguments of IDM that were given, but for its size."""
        given = {"coupling": self.coupling, "schedule": self.schedule,
                 "schedule_settings": dict(self.schedule_settings) or None,
                 "attention": self.attention and ATTENTION[self.attention]}
        return {name: value for name, value in given.items() if value is not None}

    @property
    def folder(self) -> Path:
        return self.model_dir / self.name

    @property
    def iterations(self) -> int:
        """In all epochs together, of which `max_iters` may leave a part."""
        return self.epoch * self.iters_per_epoch

    @property
    def last_iteration(self) -> int:
        return min(self.iterations, self.max_iters or self.iterations)

    def completed(self) -> "Settings":
        """Return the settings with a value for all that follows from others, where it was not given.

        Raises:
            UserError: for settings that contradict each other.
        """
        self._check_operators()
        schedule = self.lr_schedule or ("linear" if self.decay_from else "step")
        warm_up = -(-self.iterations // 50) if schedule == "cosine" else 0
        return replace(
            self, lr_schedule=schedule, warm_up=warm_up if self.warm_up is None else self.warm_up,
            train_dir=self.train_dir or self.data_dir / "pristine_images",
            cache_dir=None if self.no_cache else self.cache_dir or self.data_dir / "cache")

    def _check_operators(self) -> None:
        known = {name for operator in self.operator for name in setting_parameters(operator)}
        for name in ("cs_ratio", "block_size"):
            if name not in known and getattr(self, name) != getattr(Settings, name):
                raise UserError(f"--{name} does not apply to the operator {' or '.join(self.operator)}")
        if len(self.operator) > 1 and (wrong := [pair for pair in self.operator_settings if not pair.startswith(
                tuple(f"{operator}." for operator in self.operator))]):
            raise UserError(f"of several operators, --operator_settings must say which: {self.operator[0]}.KEY=VALUE, "
                            f"not {listed(wrong)}")
        self.measured(self.cs_ratio.values)  # which refuses what the operators do not take

    @classmethod
    def flags(cls) -> list[Field]:
        """Return the settings as fields that say how each is read."""
        return [each for each in fields(cls) if each.name not in cls.without]

    def described(
        self,
        net: nn.Module,
        before: int,  # iterations of the run that this one decays from
    ) -> list[tuple[str, str]]:
        """Return the lines of a training's opening that are about its network, with their titles."""
        source = f"{self.decay_from} after {before} iterations" if self.decay_from else self.base_model
        own = ", ".join(f"{name} {net.config[name]}" for name in self.network())
        measured = [f"ratio {self.cs_ratio}, block size {self.block_size}" if each.operator == "cs" else
                    f"{each.operator} {each.described}" for each in self.measured(self.cs_ratio.values[-1:])]
        low, high = self.noise
        return [
            ("network", f"{sum(parameter.numel() for parameter in net.parameters()):,} parameters, widths "
                        f"{' and '.join(map(str, net.config.block_out_channels))}, T = {self.step_number}, from "
                        f"{source}{f', {own}' if own else ''}"),
            ("operator", f"{' or '.join(measured)}{f', noise {low:g} to {high:g}' if high else ''}")]

    def shared(self) -> dict[str, str]:
        """Return what all processes must be given alike, as text by name."""
        return {each.name: str(getattr(self, each.name)) for each in self.flags() if not each.metadata["of_machine"]}

    def deciding(self) -> dict[str, str | int | float | None]:
        """Return all that decides what the weights will be, by name, in values that a state can hold."""
        names = [each.name for each in self.flags() if each.metadata["decides"]]
        names += ["epoch"] if self.lr_schedule in ("cosine", "linear") else []
        return {name: storable(getattr(self, name)) for name in names}


def parse_settings(description: str, kind: type[Settings] = Settings) -> Settings:
    """Read the command line as settings of this kind.

    Raises:
        UserError: for flags that there are not, and values that they do not take.
    """
    parser = Parser(description)
    for each in kind.flags():
        parser.add_argument(f"--{each.name}", **each.metadata["flag"])
    given = {name: tuple(value) if isinstance(value, list) else value
             for name, value in vars(parser.parse_args()).items()}
    return kind(**given).completed()


def storable(value: Any) -> str | int | float | None:
    return value if value is None or isinstance(value, str | int | float) else str(value)


def check_configuration(saved: dict[str, Any], now: dict[str, Any], folder: Path,
                        kind: type[Settings] = Settings) -> None:
    """Refuse to continue a run with settings that would give another result.

    A setting that a state does not name, as those written before there was such a setting, had its default.

    Raises:
        UserError: that lists every difference.
    """
    defaults = {each.name: storable(each.default) for each in kind.flags()}
    saved, now = {**defaults, **saved}, {**defaults, **now}
    differences = [f"{name} was {saved.get(name)}, is {now.get(name)}"
                   for name in sorted(saved.keys() | now.keys()) if saved.get(name) != now.get(name)]
    if differences:
        raise UserError(f"{folder} holds a run with other settings: {'; '.join(differences)}; "
                        "use the same, or another --model_dir")
