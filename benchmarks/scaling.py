"""What one training step computes (counted on tensors without data) and communicates, and how well that can scale.

    python benchmarks/scaling.py --measure           # counts; with --measure also times an all-reduce of two processes

Counted: floating-point operations of matrix products, convolutions and attention, 2 a multiplication and addition, by
PyTorch's own formulas, over the very operators that run. Communicated: one all-reduce of the gradients, which in a ring
of n makes every process send 2 (n - 1) / n times their size.
"""
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.machine import save_results  # noqa: E402
from model import IDM, BlockCompressedSensing  # noqa: E402
from utils.errors import run  # noqa: E402
from utils.flags import Parser, file_path  # noqa: E402

# The CPU's attention, of which the registry does not know.
FORMULAS = flop_registry | {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:
        lambda q, k, v, *_, **__: sdpa_flop_count(q.shape, k.shape, v.shape),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward:
        lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(grad.shape, q.shape, k.shape, v.shape),
}
SETTINGS = ("both", "sampling", "unet", "none")


class CountFlops(TorchDispatchMode):
    """Adds up the operations of everything that runs inside."""

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if formula := FORMULAS.get(function._overloadpacket):
            self.total += formula(*args, **(kwargs or {}), out_val=result)
        return result


def flops(crop: int, invertible: str, width: int, steps: int) -> tuple[int, int]:
    """Of the forward pass, and of a whole training step, for one crop."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        net = IDM((width, 2 * width), steps)
        net.invertible = invertible
        operator = BlockCompressedSensing(torch.empty(1024, 103), torch.arange(crop * crop), (crop, crop))
        x = torch.empty(1, 1, crop, crop)
        with torch.no_grad(), CountFlops() as forward:
            net(operator.A(x), operator)
        with CountFlops() as whole:
            (net(operator.A(x), operator) - x).abs().mean().backward()
    return forward.total, whole.total


def time_all_reduce(rank: int, elements: int, rounds: int, times) -> None:
    """Seconds of an all-reduce between two processes of this machine, by gloo."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29517"}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    gradients = torch.zeros(elements)
    for _ in range(rounds):
        dist.barrier()
        start = time.perf_counter()
        dist.all_reduce(gradients)
        if rank == 0:
            times.append(time.perf_counter() - start)
    dist.destroy_process_group()


def main() -> None:
    parser = Parser(__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=320, help="of the first scale; the second has twice as much")
    parser.add_argument("--step_number", type=int, default=3, help="T")
    parser.add_argument("--crops", type=int, nargs="+", default=[64, 128, 256], help="sides of crops in pixels")
    parser.add_argument("--measure", action="store_true", help="time an all-reduce of all gradients on this machine")
    parser.add_argument("--out", type=file_path, default=ROOT / "benchmarks" / "scaling.json")
    args = parser.parse_args()

    parameters = sum(p.numel() for p in IDM((args.width, 2 * args.width), args.step_number).parameters())
    result = {"torch": torch.__version__, "width": args.width, "T": args.step_number, "parameters": parameters,
              "gradient_bytes": 4 * parameters, "tflop": {}}
    print(f"{parameters:,} parameters, {4 * parameters / 1e6:.0f} MB of gradients\n"
          f"{'crop':>6} {'invertible':>10} {'forward, TFLOP':>15} {'step, TFLOP':>12} {'step / forward':>15}")
    for crop in args.crops:
        for setting in SETTINGS:
            forward, whole = flops(crop, setting, args.width, args.step_number)
            result["tflop"][f"{crop} {setting}"] = {"forward": forward / 1e12, "step": whole / 1e12}
            print(f"{crop:6} {setting:>10} {forward / 1e12:15.3f} {whole / 1e12:12.3f} {whole / forward:15.2f}")
    if args.measure:
        with multiprocessing.Manager() as manager:
            times = manager.list()
            multiprocessing.spawn(time_all_reduce, (parameters, 5, times), nprocs=2)
            seconds = result["all_reduce_seconds"] = sorted(times)
        print(f"all-reduce between two processes of this machine (gloo): {seconds[0]:.2f} to {seconds[-1]:.2f} s")
    save_results(args.out, result)


if __name__ == "__main__":
    run(main)
