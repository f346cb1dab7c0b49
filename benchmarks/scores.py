"""README's table: the compact weights on the four test sets at three ratios, by test.py, and the time that it took.

    python benchmarks/scores.py --data_dir data --processes 2
"""
import csv
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import fmean

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.machine import machine, save_results  # noqa: E402
from utils.comparison.published import RATIOS  # noqa: E402
from utils.data.testsets import KNOWN_SETS  # noqa: E402
from utils.errors import UserError, run  # noqa: E402
from utils.flags import Parser, file_path, percent  # noqa: E402


def main() -> None:
    parser = Parser(__doc__.splitlines()[0])
    parser.add_argument("--weights", type=file_path, default=Path("weight/compact"),
                        help="from the repository's folder, or absolute")
    parser.add_argument("--data_dir", type=file_path, default=ROOT / "data")
    parser.add_argument("--processes", type=int, default=1, help="that share the pictures")
    parser.add_argument("--seed", default="2025", help="of test.py")
    parser.add_argument("--out", type=file_path,
                        help="weight/compact/scores.json if not given, which is for the defaults")
    args = parser.parse_args()
    if args.out is None and any(getattr(args, name) != parser.get_default(name) for name in ("weights", "seed")):
        raise UserError("--weights and --seed need an --out; weight/compact/scores.json is of neither")
    out = args.out or ROOT / "weight" / "compact" / "scores.json"
    threads = max(1, torch.get_num_threads() // args.processes)
    with tempfile.TemporaryDirectory() as results:
        start = time.monotonic()
        test = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node",
                               str(args.processes), "test.py", "--weights", str(args.weights), "--data_dir",
                               str(args.data_dir.resolve()), "--testset_name", ",".join(KNOWN_SETS), "--cs_ratio",
                               "/".join(map(str, RATIOS)), "--seed", args.seed, "--precision", "fp32",
                               "--result_dir", results],
                              cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": str(threads)})
        if test.returncode:
            sys.exit(test.returncode)
        minutes = (time.monotonic() - start) / 60
        scores = {name: {str(ratio): averages(Path(results, name, percent(ratio), "scores.csv"))
                         for ratio in RATIOS} for name in KNOWN_SETS}
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    result = {"weights": str(args.weights), "seed": int(args.seed), "commit": commit.stdout.strip(),
              "machine": {**machine(), "threads": threads}, "processes": args.processes,
              "minutes": round(minutes, 1), "scores": scores}
    save_results(out, result)
    print(f"\n| | pictures | {' | '.join(f'{percent(ratio)} %' for ratio in RATIOS)} |\n|{' --- |' * 5}")
    for name, row in scores.items():
        cells = " | ".join(f"{cell['psnr']:.2f} / {cell['ssim']:.4f}" for cell in row.values())
        print(f"| {name} | {row[str(RATIOS[0])]['pictures']} | {cells} |")
    print(f"\n{minutes:.1f} minutes")


def averages(path: Path) -> dict[str, float | int]:
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return {"pictures": len(rows), **{name: round(fmean(float(row[name]) for row in rows), 4)
                                      for name in ("psnr", "ssim")}}


if __name__ == "__main__":
    run(main)
