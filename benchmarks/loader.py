"""Crops per second of the loader alone: from the mapped cache, from memory, and decoding a picture for each crop.

    python benchmarks/loader.py --train_dir PICTURES

The pictures are decoded as they are, and as PNG and BMP files made of them (the Waterloo Exploration Database is BMP).
All settings give the same crops, which is checked. They take turns, so that a machine whose speed drifts does so for
all of them; ratios are taken round by round. Where others use the machine, CPU time is the steadier measure. All files
are in the system's page cache by then: no disk is measured.
"""
import argparse
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.machine import machine, save_results  # noqa: E402
from utils.data.crops import TrainingCrops  # noqa: E402
from utils.data.images import read_picture  # noqa: E402
from utils.errors import run  # noqa: E402
from utils.flags import Parser, file_path  # noqa: E402

BASELINE = "decoding as given"


class Decoding:
    """Stands in for the pictures of TrainingCrops, and decodes one each time it is asked for it."""

    def __init__(self, paths: list[Path]):
        self.paths = paths

    def __getitem__(self, number: int) -> np.ndarray:
        return read_picture(self.paths[number])[0]


def main() -> None:
    parser = Parser(__doc__.splitlines()[0])
    parser.add_argument("--train_dir", type=file_path, default=ROOT / "data" / "pristine_images")
    parser.add_argument("--patch_size", type=int, nargs="+", default=[64, 128, 256], help="sides of a crop in pixels")
    parser.add_argument("--num_workers", type=int, nargs="+", default=[0, 2])
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1, help="for each setting in each round")
    parser.add_argument("--out", type=file_path, default=ROOT / "benchmarks" / "loader.json")
    args = parser.parse_args()

    cv2.setNumThreads(1)  # a loader's work is spread over processes
    with tempfile.TemporaryDirectory() as scratch:
        cache, rows = open_twice(args.train_dir, Path(scratch)), []
        convert(args.train_dir, Path(scratch), cache.pop("names"))
        for size in args.patch_size:
            sources = settings(args.train_dir, Path(scratch), size)
            for workers in args.num_workers:
                measured = {name: [] for name in sources}
                for _ in range(args.rounds):
                    for name, crops in sources.items():
                        measured[name].append(speed(crops, args.batch_size, workers, args.seconds))
                rows += summary(size, workers, len(crops.names), measured)
    report(args, cache, rows)


def open_twice(train_dir: Path, scratch: Path) -> dict:
    """What the cache takes: seconds to build and to open, and bytes."""
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        crops = TrainingCrops(train_dir, 1, cache_dir=scratch / "cache")
        seconds.append(time.perf_counter() - start)
    size = sum(path.stat().st_size for path in (scratch / "cache").iterdir())
    suffixes = Counter(Path(name).suffix.lower() for name in crops.names)
    return {"names": crops.names, "pictures": len(crops.names), "suffixes": dict(suffixes), "bytes": size,
            "build_seconds": round(seconds[0], 2), "open_seconds": round(seconds[1], 2)}


def convert(train_dir: Path, scratch: Path, names: list[str]) -> None:
    """Write each picture as PNG and as BMP, with the same pixels."""
    for name in names:
        pixels = cv2.imdecode(np.fromfile(train_dir / name, np.uint8), cv2.IMREAD_ANYCOLOR)
        for suffix in (".png", ".bmp"):
            path = scratch / suffix[1:] / (name + suffix)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(cv2.imencode(suffix, pixels)[1].tobytes())


def settings(train_dir: Path, scratch: Path, size: int) -> dict[str, TrainingCrops]:
    sources = {"mapped cache": TrainingCrops(train_dir, size, cache_dir=scratch / "cache"),
               "in memory": TrainingCrops(train_dir, size)}
    for name, folder, suffix in ((BASELINE, train_dir, ""), ("decoding PNG", scratch / "png", ".png"),
                                 ("decoding BMP", scratch / "bmp", ".bmp")):
        crops = sources[name] = TrainingCrops(train_dir, size, cache_dir=scratch / "cache")
        crops.numbers = range(len(crops.names))
        crops.pictures = Decoding([folder / (picture + suffix) for picture in crops.names])
    first = sources["mapped cache"]
    for name, crops in sources.items():
        if not all(torch.equal(first[index], crops[index]) for index in range(32)):
            sys.exit(f"error: {name} gives other crops than the cache does")
    return sources


def speed(crops: TrainingCrops, batch_size: int, workers: int, seconds: float) -> tuple[float, float]:
    """Crops per second, and microseconds of this process's CPU time per crop, of a DataLoader in its stride."""
    batches = iter(DataLoader(crops, batch_size, sampler=range(10**9), num_workers=workers))
    next(batches)  # for which workers are started: it does not count
    start, cpu_start, number = time.perf_counter(), time.process_time(), 0
    while (passed := time.perf_counter() - start) < seconds:
        number += len(next(batches))
    return number / passed, (time.process_time() - cpu_start) / number * 1e6


def summary(size: int, workers: int, pictures: int, measured: dict[str, list[tuple[float, float]]]) -> list[dict]:
    rates = {name: [rate for rate, _ in pairs] for name, pairs in measured.items()}
    return [{"patch_size": size, "num_workers": workers, "pictures": pictures, "source": name,
             "crops_per_second": round(statistics.median(values)),
             "min": round(min(values)), "max": round(max(values)),
             "times_decoding": round(statistics.median(
                 value / baseline for value, baseline in zip(values, rates[BASELINE], strict=True)), 2),
             # With workers, it is they who do the work.
             "cpu_microseconds_per_crop": None if workers else round(statistics.median(
                 cpu for _, cpu in measured[name]))}
            for name, values in rates.items()]


def report(args: argparse.Namespace, cache: dict, rows: list[dict]) -> None:
    """Print the table and write it as JSON."""
    options = {name: value for name, value in vars(args).items() if name not in ("out", "train_dir")}
    where = machine() | {"opencv": cv2.__version__, "numpy": np.__version__}
    save_results(args.out, {"machine": where, "settings": options, "cache": cache, "results": rows})
    print(f"{where}\n{options}\n{cache}\n"
          f"{'crop':>5}{'workers':>9}  {'source':20}{'crops/s':>9}{'min':>9}{'max':>9}"
          f"{'x decoding':>12}{'CPU us/crop':>13}")
    for row in rows:
        print(f"{row['patch_size']:5}{row['num_workers']:9}  {row['source']:20}"
              + "".join(f"{row[key]:9}" for key in ("crops_per_second", "min", "max"))
              + f"{row['times_decoding']:12.2f}{row['cpu_microseconds_per_crop'] or '-':>13}")


if __name__ == "__main__":
    run(main)
