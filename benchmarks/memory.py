"""Memory of one training step: what it holds beside weights and gradients, by setting, sampling steps T and crop.

    python benchmarks/memory.py                        # counted: tensors without data, so any size in seconds
    python benchmarks/memory.py --device cuda          # measured: the allocator's peak
    python benchmarks/memory.py --device cpu --crops 64

Counted or measured on a CPU, every tensor that an operator makes is followed from its making to its end; what an
operator uses inside itself is not seen. On CUDA it is the peak of what the allocator has handed out. "checkpoint" is
plain autograd with torch's checkpointing around each resnet, attention and injector. Gradients of the weights, which
every setting needs, and Adam's two averages are given apart.
"""
import argparse
import sys
from contextlib import nullcontext
from pathlib import Path

import torch
from torch._subclasses import FakeTensorMode
from torch.utils.checkpoint import checkpoint

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.machine import machine, save_results  # noqa: E402
from model import IDM, BlockCompressedSensing  # noqa: E402
from model.injector import Injector  # noqa: E402
from model.memory import FollowTensors  # noqa: E402
from model.unet import Attention, Resnet  # noqa: E402
from utils.devices import PRECISIONS, computing_in  # noqa: E402
from utils.errors import run  # noqa: E402
from utils.flags import Parser, file_path  # noqa: E402

SETTINGS = ("none", "checkpoint", "sampling", "unet", "both")
LABELLED, GPU_GB = 3, 24  # the T whose gigabytes are written out in the figure, and the line of a common GPU


def step(net: IDM, operator: BlockCompressedSensing, x: torch.Tensor, precision: str) -> None:
    with computing_in(precision, x.device):
        x_hat = net(operator.A(x), operator)
    (x_hat - x).abs().mean().backward()


def held(args: argparse.Namespace, setting: str, steps: int, crop: int) -> int:
    """Bytes that a training step holds at its peak, beside weights, their gradients and the operator."""
    device = "cpu" if args.device == "counted" else args.device
    with (FakeTensorMode(allow_non_fake_inputs=True) if args.device == "counted" else nullcontext(),
          torch.device(device)):
        net = IDM((args.width, 2 * args.width), steps)
        net.invertible = "none" if setting == "checkpoint" else setting
        if setting == "checkpoint":
            add_checkpoints(net)
        operator = BlockCompressedSensing(torch.rand(1024, 103), torch.randperm(crop * crop), (crop, crop))
        x = torch.rand(args.batch_size, 1, crop, crop)
        if device.startswith("cuda"):
            step(net, operator, x, args.precision)  # chooses kernels, which takes memory of its own
            for parameter in net.parameters():
                parameter.grad = None
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            step(net, operator, x, args.precision)
            return torch.cuda.max_memory_allocated() - before - gradient_bytes(net)
        with FollowTensors([*net.parameters(), *operator.buffers(), x]) as follow:
            step(net, operator, x, args.precision)
        return follow.peak(without=[parameter.grad for parameter in net.parameters() if parameter.grad is not None])


def add_checkpoints(net: IDM) -> None:
    for module in net.modules():
        if isinstance(module, Resnet | Attention | Injector):
            plain = module.forward
            module.forward = lambda *inputs, plain=plain: checkpoint(plain, *inputs, use_reentrant=False,
                                                                     preserve_rng_state=False)


def gradient_bytes(net: IDM) -> int:
    return sum(parameter.nbytes for parameter in net.parameters())


def measure(args: argparse.Namespace) -> dict:
    weights = gradient_bytes(IDM((args.width, 2 * args.width), 1))
    settings = {name: value for name, value in vars(args).items() if name not in ("out", "figure")}
    device = args.device if args.device.startswith("cuda") else "cpu"
    result = {"machine": machine(device), "settings": settings,
              "weights_mb": weights / 1e6, "adam_mb": 2 * weights / 1e6, "held_mb": {}}
    print(f"MB beside the weights ({weights / 1e6:.0f}), their gradients (as many), Adam's averages (twice as many); "
          f"batch {args.batch_size}, {args.precision}, {args.device}\n"
          f"{'crop':>5} {'T':>2}" + "".join(f"{setting:>12}" for setting in args.settings) + "   both saves")
    for crop in args.crops:
        for steps in args.steps:
            row = {}
            for setting in args.settings:
                try:
                    row[setting] = held(args, setting, steps, crop) / 1e6
                except (torch.OutOfMemoryError, MemoryError):
                    row[setting] = None  # it does not fit
            result["held_mb"][f"{crop}, T = {steps}"] = row
            cells = "".join(f"{'no room' if mb is None else f'{mb:.1f}':>12}" for mb in row.values())
            saved = f"{100 * (1 - row['both'] / row['none']):9.2f} %" if row.get("both") and row.get("none") else ""
            print(f"{crop:5} {steps:2}{cells}   {saved}", flush=True)
    return result


def draw(result: dict, path: Path) -> None:
    """Memory against T, a line a setting, at the largest crop."""
    from benchmarks.pictures import plt, save

    settings, crop = result["settings"], max(result["settings"]["crops"])
    figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
    for setting in settings["settings"]:
        points = [(steps, result["held_mb"][f"{crop}, T = {steps}"][setting]) for steps in settings["steps"]]
        found = [(steps, mb / 1e3) for steps, mb in points if mb is not None]
        (line,) = axes.plot(*zip(*found, strict=True), marker="o")
        name = "checkpointed blocks" if setting == "checkpoint" else setting
        axes.annotate(name, found[-1], xytext=(8, -3), textcoords="offset points", color=line.get_color())
        for steps, gigabytes in found:
            if steps == LABELLED:
                axes.annotate(f"{gigabytes:.3g} GB", (steps, gigabytes), xytext=(0, 6), textcoords="offset points",
                              ha="center", fontsize=8, color=line.get_color())
    axes.axhline(GPU_GB, color="gray", linestyle="--", linewidth=1)
    axes.text(max(settings["steps"]) * 0.78, GPU_GB * 1.05, f"a GPU of {GPU_GB} GB", color="gray", fontsize=8)
    axes.set(xlabel="sampling steps T", ylabel="GB beside weights, gradients\nand Adam's averages", yscale="log",
             xticks=settings["steps"], xlim=(None, max(settings["steps"]) * 1.38))
    axes.set_title(f"what a training step holds: batch {settings['batch_size']} of {crop}×{crop}, width "
                   f"{settings['width']}, {settings['precision']}, {settings['device']}", fontsize=10)
    axes.grid(alpha=0.3)
    save(figure, path, dpi=150)


def main() -> None:
    parser = Parser(__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=320, help="of the first scale; the second has twice as much")
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 2, 3, 4, 6], help="values of T")
    parser.add_argument("--crops", type=int, nargs="+", default=[64, 128, 256], help="sides of crops in pixels")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=SETTINGS)
    parser.add_argument("--precision", choices=list(PRECISIONS), default="fp32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "counted",
                        help="counted: tensors without data; or cpu, cuda")
    parser.add_argument("--out", type=file_path, default=ROOT / "benchmarks" / "memory.json")
    parser.add_argument("--figure", type=file_path, default=ROOT / "figs" / "memory.png")
    args = parser.parse_args()
    result = measure(args)
    save_results(args.out, result)
    draw(result, args.figure)


if __name__ == "__main__":
    run(main)
