"""The flags of train.py: the published ones under their names and defaults, and what is added."""
import argparse
import re
from dataclasses import dataclass

import torch

from utils.comparison.published import RATIOS
from utils.devices import PRECISIONS
from utils.flags import LARGEST_BLOCK, Parser, place, positive, ratios, run_name, whole


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
        return [value for value in RATIOS if self.values[0] <= value <= self.values[1]] or list(self.values)

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


def parse_args(description: str) -> argparse.Namespace:
    parser = Parser(description)
    add = parser.add_argument
    add("--epoch", type=whole(1), default=50, help="epochs to train")
    add("--step_number", type=whole(1), default=3, help="T, sampling steps")
    add("--cs_ratio", type=training_ratios, default="0.1",
        help="ratio M/N; 0.1/0.3/0.5 or the range 0.05-0.5 trains one model for all, drawing one for each batch")
    add("--block_size", type=whole(1, LARGEST_BLOCK), default=32, help="B; a row of the operator measures B*B pixels")
    add("--learning_rate", type=positive, default=1e-4, help="of Adam, at the start")
    add("--loss", choices=["l1", "log_mse"], default="l1",
        help="l1: mean |x_hat - x|, as published; log_mse: mean log of each picture's mean square error, which is PSNR")
    add("--lr_schedule", choices=["step", "cosine", "constant"], default="step",
        help="step: halve after epochs 10, 20, 30, 40; cosine: down to 0; constant: for long runs with --ema")
    add("--warm_up", type=whole(0), help="iterations over which the learning rate rises from 0; "
        "if not given, none with step and 2 %% of all with cosine")
    add("--batch_size", type=whole(1), default=8, help="crops per process")
    add("--accumulate", type=whole(1), default=1, help="batches per process that make one iteration")
    add("--patch_size", type=whole(1), default=256, help="side of a crop in pixels")
    add("--clip", type=positive, help="scale gradients down to this norm where theirs is larger; if not given, never")
    add("--ema", type=decay, help="test and save a running average of the weights with this decay, such as 0.999")
    add("--iters_per_epoch", type=whole(1), default=1000, help="iterations that make an epoch")
    add("--max_iters", type=whole(1), help="stop after this many iterations in all, with a checkpoint, "
        "which a run without this flag replaces when that epoch is finished")
    add("--base_model", default="stable-diffusion-v1-5/stable-diffusion-v1-5",
        help="where weights come from: a hub id, a folder, a file, an IDM checkpoint, or 'compact' for fresh ones")
    add("--width", type=whole(1), default=64, help="compact: width of the first scale, a multiple of "
        "2 * SHUFFLE**2; the second has twice as much")
    add("--shuffle", type=whole(1), default=4, help="compact: side of the pixel square folded into channels")
    add("--precision", choices=list(PRECISIONS),
        help="if not given: on GPUs bf16 where they have it, else fp16; on CPUs fp32")
    add("--invertible", choices=["both", "sampling", "unet", "none"], default="both",
        help="levels that keep no activations; none is fastest where memory suffices")
    add("--compile", action="store_true", help="compile the blocks of the U-Net, which takes minutes at the start")
    add("--seed", type=whole(0), default=2025, help="of the crops, operators and fresh weights")
    add("--device", help="cpu, cuda or cuda:N; CUDA if there is any")
    add("--num_workers", type=whole(0), default=0, help="processes that cut crops")
    add("--data_dir", type=place, default="data", help="folder of the test sets")
    add("--train_dir", type=place,
        help="training pictures, searched recursively; DATA_DIR/pristine_images if not given")
    add("--cache_dir", type=place, help="the pictures' luminance is kept here; DATA_DIR/cache if not given")
    add("--no_cache", action="store_true", help="decode all pictures into memory, at every start and in every process")
    add("--testset_name", default="Set11", help="tested on after each epoch: a folder of DATA_DIR, or Samples")
    add("--model_dir", type=place, default="weight", help="checkpoints and states go into a folder of it")
    add("--log_dir", type=place, default="log", help="logs go here")
    add("--save_interval", type=whole(1), default=10, help="epochs between checkpoints; the last is saved always")
    add("--save_minutes", type=positive, default=15, help="minutes between two states within an epoch")
    add("--resume", action=argparse.BooleanOptionalAction, default=True,
        help="go on from the state in the run's folder, if there is one")
    args = parser.parse_args()
    args.train_dir = args.train_dir or args.data_dir / "pristine_images"
    args.cache_dir = None if args.no_cache else args.cache_dir or args.data_dir / "cache"
    args.run_name = args.cs_ratio.run_name(args.step_number, args.block_size)
    if args.warm_up is None:
        args.warm_up = -(-args.epoch * args.iters_per_epoch // 50) if args.lr_schedule == "cosine" else 0
    return args


OF_ONE_MACHINE = ("device", "num_workers", "data_dir", "train_dir", "cache_dir", "model_dir", "log_dir")


def shared_settings(args: argparse.Namespace) -> dict[str, str]:
    """What all processes must be given alike."""
    return {name: str(value) for name, value in vars(args).items() if name not in OF_ONE_MACHINE}


def configuration(args: argparse.Namespace, pictures: str) -> dict[str, str | int | float | None]:
    """All that decides what the weights will be; a run goes on only where none of it has changed.

    --invertible and --compile are not among it: their settings have the same gradients but for rounding, and who ran
    out of memory may go on with "both". Nor is the number of processes.
    """
    names = ["base_model", "step_number", "block_size", "loss", "learning_rate", "lr_schedule", "warm_up", "batch_size",
             "accumulate", "patch_size", "clip", "ema", "iters_per_epoch", "precision", "seed"]
    names += ["width", "shuffle"] if args.base_model == "compact" else []
    names += ["epoch"] if args.lr_schedule == "cosine" else []
    return {
        **{name: getattr(args, name) for name in names},
        "cs_ratio": str(args.cs_ratio),
        "pictures": pictures,
    }
