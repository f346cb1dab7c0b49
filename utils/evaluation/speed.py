"""`--precision auto` and `--compile`: what makes a network faster on the device it is on."""
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from utils.data.testsets import Picture
from utils.distributed import Process
from utils.errors import UserError, first_line
from utils.evaluation.evaluate import Network, Scores, evaluate, mean_scores
from utils.evaluation.protocol import Protocol

MAX_COST = 0.01  # dB of PSNR
CPU_BF16 = ("avx512_bf16", "amx_bf16", "bf16")  # instructions by PyTorch's names; the last one is of ARM
# Of one kind of block there are up to seven widths, each compiled anew for new sizes and batches.
VARIANTS = 64
BACKEND = "inductor"  # PyTorch's own compiler


def half_precisions(device: torch.device) -> list[str]:
    """Of bf16 and fp16 those that the device has instructions for; elsewhere they would only be slower."""
    if device.type == "cuda":
        return ["fp16"] + ["bf16"] * torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu" and any(torch.cpu.get_capabilities().get(name) for name in CPU_BF16):
        return ["bf16"]
    return []


def pick_precision(
    process: Process,  # every one must call this; the first one's choice counts for all
    net: Network,
    pictures: Sequence[Picture],  # of the test; the first batch of them is tried on
    protocol: Protocol,
) -> tuple[str, str]:
    """Return the precision to compute in, and a sentence that says why.

    The first batch is reconstructed in fp32 and in what `half_precisions` says, twice each. The cost is the mean PSNR
    in fp32 minus that in the other precision; what is not finite is not picked.
    """
    device = process.device
    choices = half_precisions(device)
    if not choices:
        return "fp32", f"fp32, since {device} has no instructions for less"
    first, scores = [pictures[number] for number in protocol.batches(pictures, device)[0]], {}
    for precision in ("fp32", *choices):
        for _ in range(2):  # the first time also chooses kernels, or compiles
            results = evaluate(net, first, replace(protocol, precision=precision), device)
            scores[precision] = mean_scores(results)
    return process.all_gather(_choice(scores))[0]


def _choice(scores: dict[str, Scores]) -> tuple[str, str]:
    """What to pick of these precisions, fp32 among them, and why."""
    fp32 = scores["fp32"]
    halves = {precision: other for precision, other in scores.items() if precision != "fp32"}
    suitable = ["fp32", *(precision for precision, other in halves.items() if fp32.psnr - other.psnr <= MAX_COST)]
    best = min(suitable, key=lambda precision: scores[precision].seconds)
    found = (f"{precision} takes {other.seconds / fp32.seconds:.2f} times the seconds of fp32 and costs "
             f"{fp32.psnr - other.psnr:.4f} dB" for precision, other in halves.items())
    return best, f"{best}: on {fp32.count} picture{'s' if fp32.count > 1 else ''}, {'; '.join(found)}"


def compile_blocks(net: nn.Module, device: torch.device, dynamic: bool | None = None) -> None:
    """Have every resnet and attention of an IDM compiled when it is first used, one by one: all at once takes minutes.

    dynamic is torch.compile's: whether code for any size is made; None makes it when a second size is met.

    Raises UserError where there is no working compiler.
    """
    try:
        torch.compile(_trial, backend=BACKEND)(torch.ones(8, device=device))
    except Exception as error:  # of many classes, according to what is missing
        raise UserError(f"--compile finds no working compiler for {device} ({first_line(error)}); leave it out, or "
                        "install g++ for a CPU, Triton for a GPU") from error
    torch._dynamo.config.recompile_limit = VARIANTS
    net.compile_repeated_blocks(backend=BACKEND, dynamic=dynamic)


def _trial(x: torch.Tensor) -> torch.Tensor:
    return x.sin() + 1
