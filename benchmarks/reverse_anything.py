"""The second paper's table, measured: DDPM with DDNM, IDM as first published, the second paper's changes one by one.

    python benchmarks/reverse_anything.py --train_dir PICTURES --teraflop 20 --pictures 12

All are trained here by train.py and baselines.train, from fresh weights, on the same crops, with the same number of
floating-point operations: CPU time would depend on what else the machine does. What is finished is kept in --work_dir
and --out, and the same command goes on from there. The table goes into docs/reverse_anything.md.
"""
import argparse
import csv
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from baselines.ddnm import Sampling  # noqa: E402
from baselines.ddpm import DDNM, load_ddpm, noise_loss, schedule, small_unet  # noqa: E402
from benchmarks.machine import load_results, machine, save_results  # noqa: E402
from benchmarks.reverse_anything_report import show  # noqa: E402
from model import IDM, BlockCompressedSensing  # noqa: E402
from model.memory import FollowTensors  # noqa: E402
from utils.data.images import list_pictures  # noqa: E402
from utils.errors import UserError, run  # noqa: E402
from utils.flags import Parser, file_path, integer, percent, positive, ratios  # noqa: E402

CHANGES = {
    "additive coupling": ["--coupling", "additive"],
    "dynamic schedule": ["--schedule", "dynamic"],
    "random steps and noise": ["--random_steps", "--noise", "0-0.05"],
}
FIRST, SECOND, DDPM = "IDM, first paper", "second paper, all three", "DDPM with DDNM"
IDMS = {FIRST: [], **{f"first paper + {name}": flags for name, flags in CHANGES.items()},
        SECOND: [flag for flags in CHANGES.values() for flag in flags]}
DDNM_STEPS = (10, 20, 100)


@dataclass
class Bench:
    """What is measured with which settings, and what is known already."""

    args: argparse.Namespace
    results: dict

    def once(self, part: str, key: str, measure: Callable[[], object]) -> object:
        """Return results[part][key], which is measured and written where it is not there yet."""
        known = self.results.setdefault(part, {})
        if key not in known:
            print(f"{part}: {key}", flush=True)
            known[key] = measure()
            save_results(self.args.out, self.results)
        return known[key]

    def folder(self, name: str) -> Path:
        return self.args.work_dir / "".join(letter if letter.isalnum() else "_" for letter in name)

    def train(self, name: str, iterations: int) -> float:
        """Train; return the CPU seconds that this took now."""
        args, folder = self.args, self.folder(name)
        if name == DDPM:
            command = ["-m", "baselines.train", "--batch_size", str(args.ddpm_batch_size), "--learning_rate", "1e-3"]
        else:
            command = ["train.py", "--base_model", "compact", "--width", str(args.width), "--shuffle",
                       str(args.shuffle), "--attention", "none", "--step_number", str(args.step_number),
                       "--batch_size", str(args.batch_size), "--cs_ratio", "/".join(map(str, args.cs_ratio)),
                       "--learning_rate", str(args.learning_rate), "--invertible", "none",
                       "--data_dir", str(args.work_dir / "nothing_to_test"), *IDMS[name]]
        command += ["--train_dir", str(args.train_dir), "--cache_dir", str(args.work_dir / "cache"), "--patch_size",
                    str(args.patch_size), "--epoch", "1", "--iters_per_epoch", str(iterations), "--lr_schedule",
                    "cosine", "--clip", "1", "--ema", "0.995", "--seed", str(args.seed), "--model_dir", str(folder),
                    "--log_dir", str(folder / "log")]
        return call(command)

    def gigaflop(self, name: str) -> float:
        """Of an iteration, on average."""
        args = self.args
        if name == DDPM:
            return flop(small_unet, lambda net, x: noise_loss(net, schedule(), x, torch.Generator()).backward(),
                        args.patch_size, args.ddpm_batch_size) / 1e9
        settings = {flag[2:]: value for flag, value in zip(IDMS[name], IDMS[name][1:], strict=False)
                    if flag in ("--coupling", "--schedule")}
        steps = range(1, args.step_number + 1) if "--random_steps" in IDMS[name] else [args.step_number]
        return fmean(flop(lambda: IDM.compact(args.width, args.step_number, args.shuffle, attention=False, **settings),
                          idm_step(args.patch_size, "none", taken), args.patch_size, args.batch_size)
                     for taken in steps) / 1e9

    def trained(self, name: str) -> Path:
        """Train, if need be, and return the folder of the weights."""
        gigaflop = self.once("gigaflop_an_iteration", name, lambda: self.gigaflop(name))
        iterations = max(1, round(1000 * self.args.teraflop / gigaflop))
        self.once("training", name, lambda: {"cpu_seconds": self.train(name, iterations), "iterations": iterations})
        return newest(self.folder(name))

    def scores(self, weights: Path, ratio: float, steps: int, ddnm: bool) -> dict[str, float]:
        """PSNR, SSIM and whatever else test.py writes, averaged over the pictures."""
        flags = ["--method", "ddnm", "--sampling_steps"] if ddnm else ["--step_number"]
        result = self.args.work_dir / "result"
        call(["test.py", "--weights", str(weights), *flags, str(steps), "--cs_ratio", f"{ratio:g}", "--data_dir",
              str(self.args.work_dir / "data"), "--testset_name", "pictures", "--result_dir", str(result)])
        with (result / "pictures" / percent(ratio) / "scores.csv").open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        return {name: fmean(float(row[name]) for row in rows) for name in rows[0] if name not in ("name", "seconds")}


def call(command: list[str]) -> float:
    """Run Python in the repository's folder; return its CPU seconds, and end where it fails."""
    before = children()
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
                          stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        raise UserError(f"{' '.join(command[:2])} failed: {done.stderr.strip()[-500:]}")
    return children() - before


def children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def newest(folder: Path) -> Path:
    """The weights that a training has left in a folder of --model_dir."""
    return next(iter(sorted(folder.glob("*/pretrained"))))


def choose_pictures(folder: Path, count: int | None, into: Path) -> int:
    """Link `count` pictures, evenly spread over the sorted names, into a test set of their own; return how many."""
    paths = list_pictures(folder)
    chosen = paths if count is None else [paths[number * len(paths) // count] for number in range(count)]
    into.mkdir(parents=True, exist_ok=True)
    for old in into.iterdir():
        old.unlink()
    for path in chosen:
        (into / path.name).symlink_to(path.resolve())
    return len(chosen)


def seconds_an_image(networks: dict[str, nn.Module], size: tuple[int, int], rounds: int) -> dict[str, float]:
    """Median CPU seconds of one thread for one picture at 10 %; the networks take turns."""
    torch.set_num_threads(1)
    operator = BlockCompressedSensing.random(size, 0.1, 32, torch.Generator().manual_seed(0))
    y, seconds = operator.A(torch.rand(1, 1, *size)), {name: [] for name in networks}
    for _ in range(rounds):
        for name, net in networks.items():
            start = time.process_time()
            with torch.inference_mode():
                net(y, operator)
            seconds[name].append(time.process_time() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


def held_by_idm(config: dict, side: int, batch: int, setting: str) -> float:
    """MB that a training step of IDM holds at its peak beside weights, gradients and operator, by counting."""
    return held(lambda: IDM(**config), idm_step(side, setting), side, batch)


def idm_step(side: int, setting: str, steps: int | None = None) -> Callable[[IDM, Tensor], None]:
    operator = BlockCompressedSensing.random((side, side), 0.1, 32, torch.Generator().manual_seed(0))

    def step(net: IDM, x: Tensor) -> None:
        net.invertible = setting
        (net(operator.A(x), operator, steps=steps) - x).abs().mean().backward()

    return step


def held_by_ddpm(scheduler, side: int, batch: int) -> float:
    """The same of the DDPM's training step."""
    return held(small_unet, lambda net, x: noise_loss(net, scheduler, x, torch.Generator()).backward(), side, batch)


def held(build: Callable[[], nn.Module], step: Callable[[nn.Module, Tensor], None], side: int, batch: int) -> float:
    with FakeTensorMode(allow_non_fake_inputs=True):
        net, x = build(), torch.rand(batch, 1, side, side)
        with FollowTensors([*net.parameters(), x]) as follow:
            step(net, x)
        gradients = [parameter.grad for parameter in net.parameters() if parameter.grad is not None]
        return follow.peak(without=gradients) / 1e6


def flop(build: Callable[[], nn.Module], step: Callable[[nn.Module, Tensor], None], side: int, batch: int) -> int:
    """Floating-point operations of a training step: convolutions and matrix products, forward and backward."""
    net, x = build(), torch.rand(batch, 1, side, side)
    with FlopCounterMode(display=False) as counter:
        step(net, x)
    return counter.get_total_flops()


def measure(bench: Bench) -> None:
    """All parts that are not there yet."""
    args = bench.args
    weights = {name: bench.trained(name) for name in (DDPM, *IDMS)}
    for ratio in args.cs_ratio:
        for name in IDMS:
            # What was trained with random steps serves any number of them; the others, their own.
            any_number = "--random_steps" in IDMS[name]
            for steps in range(1 if any_number else args.step_number, args.step_number + 1):
                bench.once("scores", f"{name}, {steps} steps, {percent(ratio)} %", lambda name=name, steps=steps,
                           ratio=ratio: bench.scores(weights[name], ratio, steps, ddnm=False))
        for steps in args.ddnm_steps:
            bench.once("scores", f"{DDPM}, {steps} steps, {percent(ratio)} %", lambda steps=steps, ratio=ratio:
                       bench.scores(weights[DDPM], ratio, steps, ddnm=True))
    for name in IDMS:
        config = {key: value for key, value in IDM.from_pretrained(weights[name]).config.items() if key[0] != "_"}
        for setting in ("none", "both"):
            bench.once("held_mb", f"{name}, {setting}", lambda config=config, setting=setting:
                       held_by_idm(config, args.patch_size, args.batch_size, setting))
    unet, scheduler = load_ddpm(weights[DDPM])
    bench.once("held_mb", f"{DDPM}, none", lambda: held_by_ddpm(scheduler, args.patch_size, args.batch_size))
    networks = {f"{name}, {args.step_number} steps": IDM.from_pretrained(weights[name]).eval() for name in IDMS}
    networks |= {f"{DDPM}, {steps} steps": DDNM(unet, scheduler, Sampling(steps)) for steps in args.ddnm_steps}
    bench.once("seconds", "an image", lambda: seconds_an_image(networks, (288, 480), args.rounds))


def main() -> None:
    parser = Parser(__doc__.splitlines()[0])
    add = parser.add_argument
    add("--train_dir", type=file_path, required=True, help="training pictures, searched recursively")
    add("--data_dir", type=file_path, default=ROOT / "data", help="folder of the test set")
    add("--testset_name", default="CBSD68")
    add("--pictures", type=integer(1), help="of the test set, evenly spread; all if not given")
    add("--teraflop", type=positive, default=20, help="that each is trained with")
    add("--seed", type=integer(0), default=2025)
    add("--cs_ratio", type=ratios, default="0.1/0.3/0.5", help="of training and test")
    add("--step_number", type=integer(1), default=3, help="T of IDM")
    add("--ddnm_steps", type=integer(1), nargs="+", default=DDNM_STEPS)
    add("--width", type=integer(1), default=32, help="of IDM's first scale")
    add("--shuffle", type=integer(1), default=2)
    add("--patch_size", type=integer(1), default=64)
    add("--batch_size", type=integer(1), default=4, help="of IDM")
    add("--ddpm_batch_size", type=integer(1), default=16)
    add("--learning_rate", type=positive, default=1e-3, help="of IDM")
    add("--rounds", type=integer(1), default=3, help="timed reconstructions of each")
    add("--work_dir", type=file_path, default=ROOT / "result" / "reverse_anything", help="weights, states and cache")
    add("--out", type=file_path, default=ROOT / "benchmarks" / "reverse_anything.json")
    add("--report", type=file_path, default=ROOT / "docs" / "reverse_anything.md")
    add("--figure", type=file_path, default=ROOT / "figs" / "reverse_anything.png")
    args = parser.parse_args()
    args.work_dir.mkdir(parents=True, exist_ok=True)
    places = ("train_dir", "data_dir", "work_dir", "out", "report", "figure")
    settings = {name: value for name, value in vars(args).items() if name not in places}
    count = choose_pictures(args.data_dir / args.testset_name, args.pictures, args.work_dir / "data" / "pictures")
    results = load_results(args.out) or {"machine": machine(), "settings": {**settings, "pictures": count}}
    bench = Bench(args, results)
    measure(bench)
    show(results, args.report, args.figure)


if __name__ == "__main__":
    run(main)
