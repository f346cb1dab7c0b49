"""The flags of train.py: the published ones under their names and defaults, and what is added."""
import argparse
from pathlib import Path

from utils.evaluation import PRECISIONS
from utils.flags import Parser, positive, ratios, run_name, whole


def parse_args(description: str) -> argparse.Namespace:
    parser = Parser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--epoch", type=whole(1), default=50, help="epochs to train")
    add("--step_number", type=whole(1), default=3, help="T, sampling steps")
    add("--cs_ratio", type=ratios, default="0.1", help="ratio M/N; several as 0.1/0.3/0.5 train one model for all")
    add("--block_size", type=whole(1), default=32, help="B; a row of the operator measures B*B pixels")
    add("--learning_rate", type=positive, default=1e-4, help="of Adam, at the start")
    add("--lr_schedule", choices=["step", "cosine"], default="step",
        help="step: halve after epochs 10, 20, 30, 40; cosine: warm up over 2 %% of all iterations, then down to 0")
    add("--batch_size", type=whole(1), default=8, help="crops per process")
    add("--patch_size", type=whole(1), default=256, help="side of a crop in pixels")
    add("--iters_per_epoch", type=whole(1), default=1000, help="iterations that make an epoch")
    add("--max_iters", type=whole(1), help="stop after this many iterations in all, with a checkpoint, "
        "which --resume without this flag replaces when that epoch is finished")
    add("--base_model", default="stable-diffusion-v1-5/stable-diffusion-v1-5",
        help="where weights come from: a hub id, a folder, a file, an IDM checkpoint, or 'compact' for fresh ones")
    add("--width", type=whole(1), default=64, help="compact: width of the first scale; the second has twice as much")
    add("--shuffle", type=whole(1), default=4, help="compact: side of the pixel square folded into channels")
    add("--precision", choices=list(PRECISIONS), help="fp16 on CUDA, fp32 on the CPU if not given")
    add("--invertible", choices=["both", "sampling", "unet", "none"], default="both",
        help="levels that keep no activations; none is fastest where memory suffices")
    add("--seed", type=whole(0), default=2025, help="of the crops, operators and fresh weights")
    add("--device", help="cpu, cuda or cuda:N; CUDA if there is any")
    add("--num_workers", type=whole(0), default=0, help="processes that cut crops; 0 does well, as all is in memory")
    add("--data_dir", type=Path, default="data", help="folder of the test sets")
    add("--train_dir", type=Path, help="training pictures, searched recursively; DATA_DIR/pristine_images if not given")
    add("--testset_name", default="Set11", help="tested on after each epoch: a folder of DATA_DIR, or Samples")
    add("--model_dir", type=Path, default="weight", help="checkpoints and state go into a folder of it")
    add("--log_dir", type=Path, default="log", help="logs go here")
    add("--save_interval", type=whole(1), default=10, help="epochs between checkpoints; the last is saved always")
    add("--save_minutes", type=positive, default=15, help="minutes between two states within an epoch")
    add("--resume", action="store_true", help="go on from the state in the run's folder, if there is one")
    args = parser.parse_args()
    args.cs_ratio = sorted(args.cs_ratio)
    args.train_dir = args.train_dir or args.data_dir / "pristine_images"
    args.run_name = run_name(args.cs_ratio, args.step_number, args.block_size)
    return args


def configuration(args: argparse.Namespace, world_size: int, pictures: str) -> dict[str, str | int | float]:
    """All that decides what the weights will be; a run goes on only where none of it has changed.

    --invertible is not among it: its settings have the same gradients but for rounding, and who ran out of memory
    may go on with "both".
    """
    names = ["base_model", "step_number", "block_size", "learning_rate", "lr_schedule", "batch_size", "patch_size",
             "iters_per_epoch", "precision", "seed"]
    names += ["width", "shuffle"] if args.base_model == "compact" else []
    names += ["epoch"] if args.lr_schedule == "cosine" else []
    return {
        **{name: getattr(args, name) for name in names},
        "cs_ratio": "/".join(map(str, args.cs_ratio)),
        "processes": world_size,
        "pictures": pictures,
    }
