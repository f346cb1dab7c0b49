"""Seconds of one training step (forward and backward), and what it keeps, for the four `invertible` settings.

    python benchmarks/training_step.py --width 320 --crop 64 --batch_size 1 --rounds 5

The settings take turns, so that a machine whose speed drifts does so for all of them; ratios are taken round by round.
The mathematics asks of "both" 5/3 of "none": 5 passes of forward's cost (forward, recomputing a step, recomputing its
blocks, and 2 for the gradients) against 3.
"""
import argparse
import json
import platform
import statistics
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from model import IDM, BlockCompressedSensing  # noqa: E402
from model.idm import INVERTIBLE  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--width", type=int, default=320, help="of the first scale; the second has twice as much")
    parser.add_argument("--crop", type=int, default=64, help="side of a crop in pixels")
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--step_number", type=int, default=3, help="T")
    parser.add_argument("--rounds", type=int, default=5, help="timed steps a setting, after one that is not counted")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "training_step.json")
    args = parser.parse_args()

    torch.manual_seed(0)
    net = IDM((args.width, 2 * args.width), args.step_number).to(args.device)
    operator = BlockCompressedSensing.random((args.crop, args.crop), 0.1, 32, torch.Generator().manual_seed(0))
    operator.to(args.device)
    x = torch.rand(args.batch_size, 1, args.crop, args.crop, device=args.device)
    seconds = {"forward only": [], **{setting: [] for setting in INVERTIBLE}}
    kept = {}
    for counted in range(1 + args.rounds):
        seconds["forward only"].append(forward(net, operator, x))
        for setting in INVERTIBLE:
            net.invertible = setting
            if not counted:
                kept[setting] = kept_bytes(net, operator, x)
            seconds[setting].append(step(net, operator, x))
    report(args, {setting: times[1:] for setting, times in seconds.items()}, kept)


def step(net: IDM, operator: BlockCompressedSensing, x: torch.Tensor) -> float:
    """Seconds of forward and backward."""
    net.zero_grad()
    synchronize(x)
    start = time.perf_counter()
    (net(operator.A(x), operator) - x).abs().mean().backward()
    synchronize(x)
    return time.perf_counter() - start


@torch.no_grad()
def forward(net: IDM, operator: BlockCompressedSensing, x: torch.Tensor) -> float:
    """Seconds of forward without gradients."""
    synchronize(x)
    start = time.perf_counter()
    net(operator.A(x), operator)
    synchronize(x)
    return time.perf_counter() - start


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


def synchronize(x: torch.Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)


def cpu_name() -> str:
    """The CPU's model where Linux tells it, else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.machine())


def report(args: argparse.Namespace, seconds: dict[str, list[float]], kept: dict[str, int]) -> None:
    """Print the table and write it as JSON."""
    rows = {}
    for setting, times in seconds.items():
        ratios = [time / none for time, none in zip(times, seconds["none"], strict=True)]
        rows[setting] = {"seconds": round(statistics.median(times), 3),
                         "min": round(min(times), 3), "max": round(max(times), 3),
                         "times_none": round(statistics.median(ratios), 3),
                         "kept_mb": round(kept.get(setting, 0) / 1e6, 3)}
    machine = {"device": torch.cuda.get_device_name() if args.device.startswith("cuda") else cpu_name(),
               "threads": torch.get_num_threads(), "torch": torch.__version__}
    settings = {name: value for name, value in vars(args).items() if name != "out"}
    args.out.write_text(json.dumps({"machine": machine, "settings": settings, "results": rows}, indent=1) + "\n")
    print(f"{machine}\n{settings}\n{'invertible':14}{'seconds':>9}{'min':>9}{'max':>9}{'x none':>9}{'kept, MB':>12}")
    for setting, row in rows.items():
        print(f"{setting:14}" + "".join(f"{row[key]:9.3f}" for key in ("seconds", "min", "max", "times_none"))
              + f"{row['kept_mb']:12.3f}")


if __name__ == "__main__":
    main()
