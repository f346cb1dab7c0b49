"""Seconds and memory of a reconstruction, by precision, batch, compilation and processes, against the plain loop.

    python benchmarks/inference.py                              # IDM.compact() on a CPU
    python benchmarks/inference.py --width 320 --device cuda    # the published widths on a GPU

The plain loop is how the published script runs: fp32, eager, channels first, one picture after another. Settings take
turns, so that a machine whose speed drifts does so for all; how many times as fast is told round by round. "Held" is
what lives at the peak beside the weights: on CUDA by the allocator, on a CPU counted on tensors without data.
Below the table: what bounds the seconds, and the largest picture by memory.
"""
import argparse
import math
import os
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import torch.multiprocessing as multiprocessing
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.machine import machine, save_results  # noqa: E402
from model import IDM, BlockCompressedSensing, feed_forward  # noqa: E402
from model.attention import SelfAttention  # noqa: E402
from model.memory import FollowTensors  # noqa: E402
from utils import errors  # noqa: E402
from utils.devices import computing_in  # noqa: E402
from utils.evaluation.speed import compile_blocks, half_precisions  # noqa: E402
from utils.flags import Parser, file_path  # noqa: E402

Size = tuple[int, int]
MEASUREMENTS, PIXELS = 103, 1024  # M and N at 10 %; the ratio hardly matters here
PUBLISHED_WIDTH = 320
KINDS = {  # of an operation, by how its name begins
    "attention": ("aten::_scaled_dot_product", "aten::_flash_attention", "aten::_efficient_attention"),
    "convolutions": ("aten::mkldnn_convolution", "aten::_slow_conv2d", "aten::cudnn_convolution"),
    "matrix products": ("aten::addmm", "aten::mm", "aten::bmm"),
}


@dataclass(frozen=True)
class Setting:
    """One way to run the network."""

    precision: str = "fp32"
    batch: int = 1
    compiled: bool = False
    processes: int = 1  # that share the cores of a CPU
    plain: bool = False

    def __str__(self) -> str:
        return ", ".join([self.precision, f"batch {self.batch}", *["compiled"] * self.compiled,
                          *[f"{self.processes} processes"] * (self.processes > 1), *["plain loop"] * self.plain])


PLAIN = Setting(plain=True)


def network(width: int, device: str, plain: bool = False) -> IDM:
    """IDM.compact() for width 64, else the published one at this width; the weights do not matter here."""
    torch.manual_seed(0)
    with torch.device(device):
        net = (IDM.compact(width) if width == 64 else IDM((width, 2 * width))).eval()
    return net if plain or device == "cpu" else net.to(memory_format=torch.channels_last)  # as test.py has it


def operator_for(batch: int, size: Size, device: str) -> BlockCompressedSensing:
    permutations = torch.stack([torch.randperm(math.prod(size)) for _ in range(batch)])
    return BlockCompressedSensing(torch.randn(PIXELS, MEASUREMENTS) / PIXELS**0.5, permutations, size).to(device)


@torch.inference_mode()
def reconstruct(net: IDM, operator: BlockCompressedSensing, precision: str) -> None:
    x = torch.rand(len(operator.permutation), 1, *operator.image_shape, device=operator.permutation.device)
    with computing_in(precision, x.device):
        net(operator.A(x), operator)


def runner(args: argparse.Namespace, setting: Setting) -> Callable[[], tuple[float, int]]:
    """What reconstructs one batch, and tells the seconds an image took and, on CUDA, the bytes it held."""
    if setting.processes > 1:
        return shared_runner(args, setting)
    net = network(args.width, args.device, setting.plain)
    if setting.compiled:
        compile_blocks(net, torch.device(args.device))
    operator = operator_for(setting.batch, args.size, args.device)

    def run() -> tuple[float, int]:
        with feed_forward_at_once(setting.plain):
            before = start_measuring(args.device)
            start = time.perf_counter()
            reconstruct(net, operator, setting.precision)
            synchronize(args.device)
            seconds = time.perf_counter() - start
        return seconds / setting.batch, torch.cuda.max_memory_allocated() - before if on_gpu(args.device) else 0

    return run


def shared_runner(args: argparse.Namespace, setting: Setting) -> Callable[[], tuple[float, int]]:
    """As `runner`, with a batch on each of several processes at the same time."""
    alone = Setting(setting.precision, setting.batch, setting.compiled)
    context, ends = multiprocessing.get_context("spawn"), []
    for _ in range(setting.processes):
        mine, theirs = context.Pipe()
        context.Process(target=serve, args=(theirs, args, alone, setting.processes), daemon=True).start()
        theirs.close()  # so that the death of the process is noticed
        ends.append(mine)

    def run() -> tuple[float, int]:
        start = time.perf_counter()
        for end in ends:
            end.send("run")
        for end in ends:
            end.recv()
        return (time.perf_counter() - start) / setting.batch / setting.processes, 0

    return run


def serve(end: Connection, args: argparse.Namespace, setting: Setting, processes: int) -> None:
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // processes))
    run = runner(args, setting)
    with suppress(EOFError, KeyboardInterrupt):  # the benchmark has ended
        while end.recv():
            end.send(run())


def counted(width: int, setting: Setting, size: Size) -> int:
    """Bytes that live at the peak of a reconstruction beside the weights, on tensors without data, as on a CPU."""
    with FakeTensorMode(), feed_forward_at_once(setting.plain):
        net, operator = network(width, "cpu", plain=True), operator_for(setting.batch, size, "cpu")
        with FollowTensors([*net.parameters(), *operator.buffers()]) as follow:
            reconstruct(net, operator, setting.precision)
        return follow.peak(without=[]) + sum(tensor.nbytes for tensor in operator.buffers())


@contextmanager
def feed_forward_at_once(plain: bool) -> Iterator[None]:
    part = feed_forward.PART
    feed_forward.PART = sys.maxsize if plain else part
    try:
        yield
    finally:
        feed_forward.PART = part


def operations(width: int, size: Size) -> tuple[float, float]:
    """Floating-point operations of a reconstruction: all, and those of attention alone."""
    places = []
    with FakeTensorMode():
        net, operator = network(width, "cpu", plain=True), operator_for(1, size, "cpu")
        for module in net.modules():
            if isinstance(module, SelfAttention):
                module.register_forward_pre_hook(
                    lambda module, inputs: places.append(inputs[0].shape[1] * inputs[0].numel()))
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            net(operator.A(torch.rand(1, 1, *size)), operator)
    attention = 4 * sum(places)  # two products of places × places × channels; the counter knows not every kernel of it
    others = sum(count for name, count in counter.get_flop_counts()["Global"].items() if "attention" not in str(name))
    return others + attention, attention


def matrix_speed(args: argparse.Namespace) -> float:
    """Operations a second of this machine's product of two 1024×1024 matrices (8192 on a GPU), the best of ten."""
    side = 8192 if on_gpu(args.device) else 1024
    a = torch.rand(side, side, device=args.device)
    best = math.inf
    for _ in range(10):
        synchronize(args.device)
        start = time.perf_counter()
        a @ a
        synchronize(args.device)
        best = min(best, time.perf_counter() - start)
    return 2 * side**3 / best


def shares(args: argparse.Namespace) -> dict[str, float]:
    """Parts of the plain loop's time by kind of operation."""
    net, operator = network(args.width, args.device, plain=True), operator_for(1, args.size, args.device)
    reconstruct(net, operator, "fp32")
    with torch.profiler.profile() as profile:
        reconstruct(net, operator, "fp32")
    seconds = Counter()
    for event in profile.key_averages():
        kind = next((kind for kind, names in KINDS.items() if event.key.startswith(names)), "all else")
        seconds[kind] += event.self_device_time_total if on_gpu(args.device) else event.self_cpu_time_total
    return {kind: seconds[kind] / sum(seconds.values()) for kind in (*KINDS, "all else")}


def largest(width: int, gigabytes: float, precision: str) -> int:
    """Pixels of the largest picture beside the weights, from what a pixel of a picture of 2040×1356 takes."""
    size = 2048, 1376  # after padding
    a_pixel = counted(width, Setting(precision), size) / math.prod(size)
    weights = sum(parameter.nbytes for parameter in network(width, "meta", plain=True).parameters())
    return int((gigabytes * 1e9 - weights) / a_pixel)


def on_gpu(device: str) -> bool:
    return torch.device(device).type == "cuda"


def synchronize(device: str) -> None:
    if on_gpu(device):
        torch.cuda.synchronize(device)


def start_measuring(device: str) -> int:
    """Bytes that are allocated on a GPU now, from which on the peak is looked for."""
    synchronize(device)
    if not on_gpu(device):
        return 0
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def settings_for(args: argparse.Namespace) -> list[Setting]:
    """The plain loop, and what is worth comparing with it on this device."""
    halves = half_precisions(torch.device(args.device))
    if on_gpu(args.device):
        return [PLAIN, Setting()] + [Setting(precision, batch, compiled) for precision in halves
                                     for batch in args.batches for compiled in (False, True)]
    several = os.cpu_count() or 1
    return [PLAIN, Setting(), *[Setting(batch=batch) for batch in args.batches if batch > 1], Setting(compiled=True),
            *[Setting(precision, compiled=compiled) for precision in halves for compiled in (False, True)],
            *[Setting(processes=several, compiled=compiled) for compiled in (False, True) if several > 1]]


def measure(args: argparse.Namespace) -> dict:
    settings = settings_for(args)
    runners = {setting: runner(args, setting) for setting in settings}
    seconds, held = {setting: [] for setting in settings}, {}
    for number in range(-1, args.rounds):  # the first round also compiles
        for setting, run in runners.items():
            start = time.perf_counter()
            took, held[setting] = run()
            seconds[setting].append(took)
            if number < 0:
                print(f"warmed up in {time.perf_counter() - start:6.1f} s: {setting}", flush=True)
    rows = {}
    for setting, (_, *times) in seconds.items():
        gains = [plain / own for plain, own in zip(seconds[PLAIN][1:], times, strict=True)]
        if not on_gpu(args.device) and not setting.compiled:  # what is compiled cannot be counted
            held[setting] = setting.processes * counted(args.width, setting, args.size)
        rows[str(setting)] = {"seconds": statistics.median(times), "least": min(times), "most": max(times),
                              "times_as_fast": statistics.median(gains), "held_mb": held[setting] / 1e6 or None}
    every, attention = operations(args.width, args.size)
    return {"machine": machine(args.device),
            "settings": {name: value for name, value in vars(args).items() if name != "out"}, "results": rows,
            "bounds": {"gigaoperations": every / 1e9, "of_attention": attention / every,
                       "matrix_gigaoperations_a_second": matrix_speed(args) / 1e9, "shares_of_plain": shares(args)},
            "counted": {f"width {width}": {
                "held_2040x1356_mb": {name: counted(width, setting, (2048, 1376)) / 1e6 for name, setting in
                                      {"plain loop": PLAIN, "fp32": Setting(), "bf16": Setting("bf16")}.items()},
                "largest_picture": {f"{gigabytes} GB, {precision}": largest(width, gigabytes, precision)
                                    for gigabytes in (8, 24) for precision in ("fp32", "bf16")}}
                for width in sorted({args.width, PUBLISHED_WIDTH})}}


def report(result: dict) -> None:
    print(f"{result['machine']}\n{result['settings']}\n\n"
          f"{'':34}{'s / image':>10}{'least':>8}{'most':>8}{'x plain':>9}{'held, MB':>10}")
    for name, row in result["results"].items():
        print(f"{name:34}{row['seconds']:10.3f}{row['least']:8.3f}{row['most']:8.3f}{row['times_as_fast']:9.2f}"
              f"{'-' if row['held_mb'] is None else round(row['held_mb'], 1):>10}")
    bounds = result["bounds"]
    speed = bounds["matrix_gigaoperations_a_second"]
    print(f"\n{bounds['gigaoperations']:.0f} G operations an image, {100 * bounds['of_attention']:.0f} % of them in "
          f"attention; at this machine's matrix product in fp32, {speed:.0f} G a second, they take "
          f"{bounds['gigaoperations'] / speed:.2f} s\nof the plain loop's time: "
          + ", ".join(f"{kind} {100 * share:.0f} %" for kind, share in bounds["shares_of_plain"].items()))
    for width, found in result["counted"].items():
        held = ", ".join(f"{name} {mb:.0f} MB" for name, mb in found["held_2040x1356_mb"].items())
        rooms = ", ".join(f"{count / 1e6:.1f} megapixels in {room}" for room, count in found["largest_picture"].items())
        print(f"counted, not run: at {width} a picture of 2040x1356 holds {held}; the largest picture is {rooms}")


def main() -> None:
    parser = Parser(__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=64,
                        help="of the first scale; 64 is IDM.compact()'s, 320 the published one's")
    parser.add_argument("--size", type=int, nargs=2, default=[256, 256], help="height and width, multiples of 32")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=5, help="timed runs of each setting, after one that is not")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=file_path, default=ROOT / "benchmarks" / "inference.json")
    args = parser.parse_args()
    args.size = tuple(args.size)
    result = measure(args)
    report(result)
    save_results(args.out, result)


if __name__ == "__main__":
    errors.run(main)
