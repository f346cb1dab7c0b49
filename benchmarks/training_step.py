"""Seconds of one training step (forward and backward), and what it keeps, for the four `invertible` settings.

    python benchmarks/training_step.py --rounds 5                                   # full width, one 64x64 crop
    python benchmarks/training_step.py --compact --batch_size 4 --out FILE.json     # IDM.compact()

"published" is the step as the published code back-propagates it (published_step.py).  The settings take turns, so that
a machine whose speed drifts does so for all of them; ratios are taken round by round.  Where others use the machine
too, ratios of CPU time are the steadier ones.

The mathematics asks of "both" 5 − 1/T passes of forward's cost (forward; recomputing a step, but for the last, whose
graph is kept; recomputing its blocks; and 2 for the gradients) against 3: at T = 3, 1.56 of "none".
"""
import argparse
import statistics
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.machine import machine, save_results  # noqa: E402
from benchmarks.published_step import published  # noqa: E402
from model import IDM, BlockCompressedSensing  # noqa: E402
from model.idm import INVERTIBLE  # noqa: E402
from utils.errors import run  # noqa: E402
from utils.flags import Parser, file_path  # noqa: E402

Seconds = tuple[float, float]  # on the clock, and of the CPU


def main() -> None:
    parser = Parser(__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=320, help="of the first scale; the second has twice as much")
    parser.add_argument("--compact", action="store_true", help="IDM.compact(), whatever --width says")
    parser.add_argument("--crop", type=int, default=64, help="side of a crop in pixels")
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--step_number", type=int, default=3, help="T")
    parser.add_argument("--rounds", type=int, default=5, help="timed steps a setting, after one that is not counted")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=file_path, default=ROOT / "benchmarks" / "training_step.json")
    args = parser.parse_args()

    torch.manual_seed(0)
    net = IDM.compact(num_steps=args.step_number) if args.compact else \
        IDM((args.width, 2 * args.width), args.step_number)
    net.to(args.device)
    operator = BlockCompressedSensing.random((args.crop, args.crop), 0.1, 32, torch.Generator().manual_seed(0))
    operator.to(args.device)
    x = torch.rand(args.batch_size, 1, args.crop, args.crop, device=args.device)
    before = machine(args.device)
    seconds = {"forward only": [], **{setting: [] for setting in INVERTIBLE}, "published": []}
    kept = {}
    for counted in range(1 + args.rounds):
        seconds["forward only"].append(forward(net, operator, x))
        for setting in (*INVERTIBLE, "published"):
            net.invertible = setting if setting != "published" else "both"
            with published(net) if setting == "published" else nullcontext():
                if not counted:
                    kept[setting] = kept_bytes(net, operator, x)
                seconds[setting].append(step(net, operator, x))
    report(args, before, {setting: times[1:] for setting, times in seconds.items()}, kept)


def step(net: IDM, operator: BlockCompressedSensing, x: torch.Tensor) -> Seconds:
    """Forward and backward."""
    net.zero_grad()
    start = now(x)
    (net(operator.A(x), operator) - x).abs().mean().backward()
    return since(start, x)


@torch.no_grad()
def forward(net: IDM, operator: BlockCompressedSensing, x: torch.Tensor) -> Seconds:
    """Forward without gradients."""
    start = now(x)
    net(operator.A(x), operator)
    return since(start, x)


def now(x: torch.Tensor) -> Seconds:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
    return time.perf_counter(), time.process_time()


def since(start: Seconds, x: torch.Tensor) -> Seconds:
    end = now(x)
    return end[0] - start[0], end[1] - start[1]


def kept_bytes(net: IDM, operator: BlockCompressedSensing, x: torch.Tensor) -> int:
    """What forward keeps for backward, each storage once, without weights, operator and measurement."""
    y = operator.A(x)
    known = {tensor.untyped_storage().data_ptr() for tensor in (*net.parameters(), *operator.buffers(), y)}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        net(y, operator)
    return sum(kept.values())


def report(args: argparse.Namespace, where: dict, seconds: dict[str, list[Seconds]], kept: dict[str, int]) -> None:
    """Print the table and write it as JSON."""
    rows = {}
    for setting, times in seconds.items():
        clock, cpu = ([pair[kind] for pair in times] for kind in (0, 1))
        ratios = ([pair[kind] / none[kind] for pair, none in zip(times, seconds["none"], strict=True)]
                  for kind in (0, 1))
        times_none, cpu_times_none = (round(statistics.median(ratio), 3) for ratio in ratios)
        rows[setting] = {"seconds": round(statistics.median(clock), 3), "min": round(min(clock), 3),
                         "max": round(max(clock), 3), "times_none": times_none,
                         "cpu_seconds": round(statistics.median(cpu), 3), "cpu_times_none": cpu_times_none,
                         "kept_mb": round(kept.get(setting, 0) / 1e6, 3)}
    faster = [[old[kind] / ours[kind] for old, ours in zip(seconds["published"], seconds["both"], strict=True)]
              for kind in (0, 1)]
    both_to_published = {"seconds": round(statistics.median(faster[0]), 3),
                         "cpu_seconds": round(statistics.median(faster[1]), 3)}
    settings = {name: value for name, value in vars(args).items() if name != "out"}
    save_results(args.out, {"machine": where, "settings": settings, "results": rows,
                            "published_by_both": both_to_published})
    columns = {"seconds": "seconds", "min": "min", "max": "max", "times_none": "x none", "cpu_seconds": "CPU s",
               "cpu_times_none": "x none", "kept_mb": "kept, MB"}
    print(f"{where}\n{settings}\n{'invertible':14}" + "".join(f"{title:>10}" for title in columns.values()))
    for setting, row in rows.items():
        print(f"{setting:14}" + "".join(f"{row[key]:10.3f}" for key in columns))
    print(f"\"both\" is {both_to_published['seconds']:.2f} times as fast as the published way "
          f"({both_to_published['cpu_seconds']:.2f} times by CPU time)")


if __name__ == "__main__":
    run(main)
