"""The flags of train.py: the published ones under their names and defaults, and what is added."""
import argparse
from pathlib import Path

from utils.errors import UserError
from utils.evaluation import PRECISIONS


def parse_args(description: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--epoch", type=int, default=50, help="epochs to train")
    add("--step_number", type=int, default=3, help="T, sampling steps")
    add("--cs_ratio", default="0.1", help="ratio M/N; several as 0.1/0.3/0.5 train one model for all")
    add("--block_size", type=int, default=32, help="B; a row of the operator measures B*B pixels")
    add("--learning_rate", type=float, default=1e-4, help="of Adam, at the start")
    add("--lr_schedule", choices=["step", "cosine"], default="step",
        help="step: halve after epochs 10, 20, 30, 40; cosine: warm up over 2 %% of all iterations, then down to 0")
    add("--batch_size", type=int, default=8, help="crops per process")
    add("--patch_size", type=int, default=256, help="side of a crop in pixels")
    add("--iters_per_epoch", type=int, default=1000, help="iterations that make an epoch")
    add("--max_iters", type=int, help="stop after this many iterations in all")
    add("--base_model", default="stable-diffusion-v1-5/stable-diffusion-v1-5",
        help="where weights come from: a hub id, a folder, a file, an IDM checkpoint, or 'compact' for fresh ones")
    add("--width", type=int, default=64, help="compact: width of the first scale; the second has twice as much")
    add("--shuffle", type=int, default=4, help="compact: side of the pixel square folded into channels")
    add("--precision", choices=list(PRECISIONS), help="fp16 on CUDA, fp32 on the CPU if not given")
    add("--invertible", choices=["both", "sampling", "unet", "none"], default="both",
        help="levels that keep no activations; none is fastest where memory suffices")
    add("--seed", type=int, default=2025, help="of the crops, operators and fresh weights")
    add("--device", help="cpu, cuda or cuda:N; CUDA if there is any")
    add("--num_workers", type=int, default=0, help="processes that cut crops; pictures are in memory, so 0 does well")
    add("--data_dir", type=Path, default="data", help="folder of the test sets")
    add("--train_dir", type=Path, help="training pictures, searched recursively; DATA_DIR/pristine_images if not given")
    add("--testset_name", default="Set11", help="tested on after each epoch: a folder of DATA_DIR, or Samples")
    add("--model_dir", type=Path, default="weight", help="checkpoints and state go into a folder of it")
    add("--log_dir", type=Path, default="log", help="logs go here")
    add("--save_interval", type=int, default=10, help="epochs between checkpoints")
    add("--save_minutes", type=float, default=15, help="minutes between two states within an epoch")
    add("--resume", action="store_true", help="go on from the state in the run's folder, if there is one")
    args = parser.parse_args()
    _check(args)
    return args


def _check(args: argparse.Namespace) -> None:
    """Turn the ratios into numbers, complete what depends on other flags, and refuse what cannot be."""
    try:
        args.cs_ratio = sorted({float(ratio) for ratio in args.cs_ratio.replace(",", "/").split("/")})
    except ValueError:
        raise UserError(f"--cs_ratio {args.cs_ratio} is no list of numbers; write 0.1 or 0.1/0.3/0.5") from None
    if not all(0 < ratio <= 1 for ratio in args.cs_ratio):
        raise UserError(f"--cs_ratio must lie in (0, 1], not {args.cs_ratio}")
    for name in ("epoch", "step_number", "block_size", "learning_rate", "batch_size", "patch_size", "iters_per_epoch",
                 "max_iters", "width", "shuffle", "save_interval", "save_minutes"):
        value = getattr(args, name)
        if value is not None and not value > 0:
            raise UserError(f"--{name} must be above 0, not {value}")
    if args.seed < 0 or args.num_workers < 0:
        raise UserError("--seed and --num_workers must not be below 0")
    args.train_dir = args.train_dir or args.data_dir / "pristine_images"


def run_name(args: argparse.Namespace) -> str:
    """Of the run's folder and log, as published: R_0.10_T_3_B_32."""
    ratios = "-".join(f"{ratio:.2f}" for ratio in args.cs_ratio)
    return f"R_{ratios}_T_{args.step_number}_B_{args.block_size}"


def configuration(args: argparse.Namespace, world_size: int, pictures: str) -> dict[str, str | int | float]:
    """All that decides what the weights will be; a run goes on only where none of it has changed."""
    names = ["base_model", "step_number", "block_size", "learning_rate", "lr_schedule", "batch_size", "patch_size",
             "iters_per_epoch", "precision", "invertible", "seed"]
    names += ["width", "shuffle"] if args.base_model == "compact" else []
    names += ["epoch"] if args.lr_schedule == "cosine" else []
    return {
        **{name: getattr(args, name) for name in names},
        "cs_ratio": "/".join(map(str, args.cs_ratio)),
        "processes": world_size,
        "pictures": pictures,
    }
