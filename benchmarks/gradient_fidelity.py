"""How true gradients are: of the reversible network to plain autograd's, and of half precision to fp32's.

    python benchmarks/gradient_fidelity.py
    python benchmarks/gradient_fidelity.py --parts half_full --batch_size 8 --crop 256 --device cuda

Parts, each for a network:
reversal_*   "both" against "none" in the same precision, T in --steps, streams stored (store_every 1) or inverted;
             and, for scale, "none" against itself where y is changed in its last bit
small_v_*    "both" against "none", level two's v's all alike, for each of --v, streams stored or inverted
half_*       a half-precision step against an fp32 one, T = 3
ablate_*     each ingredient by itself: kept in fp32 in a half-precision step where autocast alone decides, or alone in
             half in an fp32 step, T = 3
chain        the up blocks' chains at full width, inverted, against plain autograd

Networks: narrow, fresh weights (--width); compact, the trained weights that come along (T = 3); full, fresh weights at
full width.

All parameters' gradients together count as one vector, of which "error" is the relative error; numbers are means over
--draws, "least" is the least cosine of one; "worst group" is the group of parameters that is farthest off.
The loss |x̂ − x| has a kink: where x̂ comes out on the other side of x, that pixel's gradient flips, however small the
difference.  "fixed signs" differentiates sign(x̂ − x)·x̂ with fp32's signs instead, which leaves the arithmetic alone.
Losses are scaled by 4096.  Each part replaces its own results in the JSON file; the figure shows them all.
"""
import argparse
import json
import sys
import warnings
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.gradient_fidelity_report import Row, averages, draw, show  # noqa: E402
from benchmarks.half_precision import (  # noqa: E402
    ALWAYS_FULL,
    INGREDIENTS,
    arithmetic_shares,
    autocast_alone,
    half_alone,
    half_products,
)
from benchmarks.machine import machine, save_results  # noqa: E402
from model import IDM, BlockCompressedSensing, LinearOperator  # noqa: E402
from model.injector import Injector  # noqa: E402
from model.unet import Attention, Resnet  # noqa: E402
from utils.data.testsets import SAMPLE_SIZE, load_testset  # noqa: E402
from utils.devices import PRECISIONS, computing_in  # noqa: E402
from utils.errors import UserError, run  # noqa: E402
from utils.flags import Parser, file_path  # noqa: E402

LOSS_SCALE = 4096.0  # a power of two: of consequence in fp16 alone, whose smallest numbers are 6e-8
Gradients = dict[str, Tensor]


class Setting:
    """Crops of photographs, their operator, and where and how to compute."""

    def __init__(self, args: argparse.Namespace, seed: int):
        self.device, self.native = args.device, args.native
        pictures, random = load_testset("Samples"), np.random.default_rng(seed)
        crops = []
        for choice in random.integers(len(pictures), size=args.batch_size):
            top, left = (random.integers(side - args.crop + 1) for side in pictures[choice].luminance.shape)
            crops.append(pictures[choice].luminance[top:top + args.crop, left:left + args.crop])
        self.x = torch.from_numpy(np.stack(crops)).to(self.device)[:, None].float() / 255
        generator = torch.Generator().manual_seed(seed)
        self.operator = BlockCompressedSensing.random((args.crop, args.crop), 0.1, 32, generator).to(self.device)

    def half_products(self):
        """What to compute products of half-precision numbers with."""
        return nullcontext() if self.native else half_products(self.device)


def gradients(
    net: IDM,
    setting: Setting,
    precision: str,
    operator: LinearOperator | None = None,  # another than the setting's
    y: Tensor | None = None,  # another than what the setting's operator measures
    signs: Tensor | None = None,  # of fp32's x̂ − x
) -> tuple[Tensor, Gradients, Gradients]:
    """x̂, the gradients of mean |x̂ − x|, and those with fixed signs (the same again where there are none)."""
    parameters = dict(net.named_parameters())
    with setting.half_products():
        with computing_in(precision, setting.device):
            x_hat = net(setting.operator.A(setting.x) if y is None else y, operator or setting.operator)
        losses = [(x_hat - setting.x).abs().mean(), *([] if signs is None else [(signs * x_hat).mean()])]
        found = [torch.autograd.grad(LOSS_SCALE * loss, parameters.values(), retain_graph=loss is not losses[-1])
                 for loss in losses]
    named = [dict(zip(parameters, each, strict=True)) for each in found]
    if not all(gradient.isfinite().all() for gradient in found[-1]):
        raise FloatingPointError(f"a gradient in {precision} is not finite")
    return x_hat.detach(), named[0], named[-1]


def compare(ours: Gradients, reference: Gradients, groups: dict[str, str]) -> dict:
    """1 - cosine and relative error over all parameters, and 1 - cosine of each group of them."""
    def norm(gradients: Iterable[Tensor]) -> float:
        return sum(float(gradient.double().square().sum()) for gradient in gradients) ** 0.5

    def off(names: Iterable[str]) -> float:  # half the squared distance of the unit vectors: no digits are lost
        a, b = norm(ours[name] for name in names), norm(reference[name] for name in names)
        if not (a and b):  # a group that has no part in it, or has it in one only
            return float(a != b)
        return norm(ours[name].double() / a - reference[name].double() / b for name in names) ** 2 / 2

    members = {group: [name for name in reference if groups[name] == group] for group in set(groups.values())}
    return {"off": off(list(reference)), "groups": {group: off(names) for group, names in members.items()},
            "relative_error": norm(ours[name] - reference[name] for name in reference) / norm(reference.values())}


def parameter_groups(net: nn.Module) -> dict[str, str]:
    """Name of each parameter -> what it belongs to."""
    kinds = {Resnet: "resnets", Attention: "attention", Injector: "injectors"}
    groups = {}
    for name, _ in net.named_parameters():
        owners = [net.get_submodule(name.rsplit(".", depth)[0]) for depth in range(1, name.count(".") + 1)]
        kind = next((kinds[type(owner)] for owner in owners if type(owner) in kinds), None)
        groups[name] = kind or ("other convolutions" if "conv" in name or "sample" in name else "v, alpha, scales")
    return groups


def network(name: str, args: argparse.Namespace, steps: int = 3) -> IDM:
    if name == "compact":
        return IDM.from_checkpoint(ROOT / "weight" / "compact").to(args.device)
    return (IDM((args.width, 2 * args.width), steps) if name == "narrow" else IDM(num_steps=steps)).to(args.device)


def reversal(name: str, args: argparse.Namespace, setting: Setting) -> list[Row]:
    rows, y = [], setting.operator.A(setting.x)
    variants = {"reversible, streams stored": ("both", 1, y), "reversible, streams inverted": ("both", None, y),
                "plain, y's last bit changed": ("none", 1, y.nextafter(y + 1))}
    for steps in args.steps:
        net = network(name, args, steps)
        groups = parameter_groups(net)
        for precision in args.precisions:
            net.invertible = "none"
            _, plain, _ = gradients(net, setting, precision)
            for label, (net.invertible, net.store_every, measurement) in variants.items():
                _, ours, _ = gradients(net, setting, precision, y=measurement)
                rows.append(({"precision": precision, "T": steps, "step": label}, compare(ours, plain, groups)))
    return rows


def small_v(name: str, args: argparse.Namespace, setting: Setting) -> list[Row]:
    rows = []
    for steps in [3] if name == "compact" else args.steps:
        for v in args.v:
            net = network(name, args, steps)
            groups = parameter_groups(net)
            with torch.no_grad():  # fresh weights are perturbed, since some of them are 0
                for parameter_name, parameter in net.named_parameters():
                    parameter.add_(0.02 * torch.randn_like(parameter))
                    if parameter_name.startswith("unet.") and parameter_name.endswith(".v"):
                        parameter.fill_(v)
            for precision in args.precisions:
                net.invertible, net.store_every = "none", 1
                _, plain, _ = gradients(net, setting, precision)
                net.invertible = "both"
                inverted = [("inverted", None)] if precision == "fp32" and v >= 0.05 else []  # else there is no bound
                for step, net.store_every in (("stored", 1), *inverted):
                    with warnings.catch_warnings():
                        warnings.simplefilter("ignore")  # of what is measured here
                        _, ours, _ = gradients(net, setting, precision)
                    label = {"precision": precision, "T": steps, "v": v, "step": step}
                    rows.append((label, compare(ours, plain, groups)))
    return rows


def chain(args: argparse.Namespace, setting: Setting) -> list[Row]:
    """The chains of both up blocks, 11 couplings each, at full width."""
    net = IDM(num_steps=1)
    rows = []
    for block, channels, skips, factor in ((0, 640, (640, 320), 4), (1, 320, (320, 320), 2)):
        engine, side = net.unet.up_blocks[block].chain.to(args.device), args.crop // factor
        inputs = {name: torch.randn(1, width, side, side, device=args.device, requires_grad=True)
                  for name, width in zip(("x1", "x2", "skip 1", "skip 2"), (channels, channels, *skips), strict=True)}
        probes = [torch.randn(1, channels, side, side, device=args.device) for _ in range(2)]
        back_projection = setting.operator.A_adjoint(setting.operator.A(setting.x[:1]))
        injection = (torch.nn.functional.pixel_unshuffle(back_projection, factor), setting.operator, 1)
        attention = [injection, (), injection]
        contexts = [*attention, (inputs["skip 1"],), *attention, (inputs["skip 2"],), *attention]
        leaves = inputs | dict(engine.named_parameters())
        groups = dict.fromkeys(inputs, "streams and skips") | parameter_groups(engine)
        for precision in args.precisions:
            found = []
            for reversible in (False, True):
                with setting.half_products():
                    with computing_in(precision, setting.device):
                        streams = engine(inputs["x1"], inputs["x2"], contexts, reversible=reversible)
                    loss = sum((stream * probe).mean() for stream, probe in zip(streams, probes, strict=True))
                    found.append(torch.autograd.grad(LOSS_SCALE * loss, leaves.values()))
            plain, ours = (dict(zip(leaves, each, strict=True)) for each in found)
            label = {"precision": precision, "chain": f"up block {block}", "channels": channels, "side": side}
            rows.append((label, compare(ours, plain, groups)))
    return rows


class Reference:
    """An fp32 step of a network, by plain autograd, and how far others are from it."""

    def __init__(self, net: IDM, setting: Setting):
        net.invertible = "none"
        self.net, self.setting, self.groups = net, setting, parameter_groups(net)
        self.x_hat, self.gradients, _ = gradients(net, setting, "fp32")
        self.signs = (self.x_hat - setting.x).sign()

    def distance(self, precision: str, operator: LinearOperator | None = None, reversible: bool = False) -> dict:
        self.net.invertible = "both" if reversible else "none"
        x_hat, ours, fixed = gradients(self.net, self.setting, precision, operator, signs=self.signs)
        arithmetic = compare(fixed, self.gradients, self.groups)
        return compare(ours, self.gradients, self.groups) | {
            "fixed_signs": {key: arithmetic[key] for key in ("off", "relative_error")},
            "flipped_pixels": float(((x_hat - self.setting.x).sign() != self.signs).float().mean()),
            "x_hat_error": float((x_hat - self.x_hat).norm() / (self.x_hat - self.setting.x).norm())}


def half(name: str, args: argparse.Namespace, setting: Setting) -> list[Row]:
    net, rows = network(name, args), []
    reference = Reference(net, setting)
    for precision in halves(args):
        with autocast_alone(net):
            rows.append(({"precision": precision, "step": "autocast alone"}, reference.distance(precision)))
        for step, reversible in (("as it is", False), ("reversible", True)):
            rows.append(({"precision": precision, "step": step}, reference.distance(precision, reversible=reversible)))
    return rows


def ablate(name: str, args: argparse.Namespace, setting: Setting) -> list[Row]:
    net, rows = network(name, args), []
    reference = Reference(net, setting)
    for precision in halves(args):
        for ingredient in (None, *INGREDIENTS):
            with autocast_alone(net, but=ingredient):
                label = {"precision": precision, "in fp32": ingredient or "nothing"}
                rows.append((label, reference.distance(precision)))
        for ingredient in (*INGREDIENTS, *ALWAYS_FULL):
            with half_alone(net, setting.operator, ingredient, PRECISIONS[precision]) as operator:
                label = {"precision": precision, "in half": ingredient}
                rows.append((label, reference.distance("fp32", operator)))
    return rows


def halves(args: argparse.Namespace) -> list[str]:
    return [precision for precision in args.precisions if precision != "fp32"]


def main() -> None:
    parser = Parser(__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", type=words(PARTS), default=DEFAULT_PARTS, help=f"of {', '.join(PARTS)}")
    parser.add_argument("--width", type=int, default=32, help="of the narrow network's first scale")
    parser.add_argument("--crop", type=int, default=64, help="side of a crop in pixels")
    parser.add_argument("--batch_size", type=int, default=2)
    parser.add_argument("--steps", type=lambda text: [int(number) for number in text.split(",")],
                        default=[1, 2, 3, 4, 5, 6], help="T's, for reversal")
    parser.add_argument("--v", type=lambda text: [float(number) for number in text.split(",")],
                        default=[1, 0.5, 0.2, 0.1, 0.05, 0.01, 0], help="for small_v")
    parser.add_argument("--precisions", type=words(PRECISIONS), default=[*PRECISIONS],
                        help=f"of {', '.join(PRECISIONS)}")
    parser.add_argument("--native", action="store_true",
                        help="on a CPU, use its own half-precision kernels; else products of half-precision numbers "
                             "are summed up in fp32 and rounded once, as tensor cores do")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--draws", type=int, default=4, help="of crops, operator and fresh weights, averaged over")
    parser.add_argument("--out", type=file_path, default=ROOT / "benchmarks" / "gradient_fidelity.json")
    parser.add_argument("--figure", type=file_path, default=ROOT / "figs" / "gradient_fidelity.png")
    args = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False  # fp32 is what is compared with

    if args.crop % 32 or not 0 < args.crop <= SAMPLE_SIZE:
        raise UserError(f"--crop {args.crop} must be a multiple of 32 up to {SAMPLE_SIZE}")

    results = json.loads(args.out.read_text()) if args.out.exists() else {}
    options = {name: value for name, value in vars(args).items() if name not in ("out", "figure", "parts")}
    if args.device == "cpu" and not args.native:
        options["half-precision products"] = "summed up in fp32 and rounded once"
    if any(part.startswith("ablate") for part in args.parts):
        results["arithmetic_shares"] = {name: float(f"{share:.3g}") for name, share in arithmetic_shares().items()}
    for part in args.parts:
        draws = []
        for seed in range(args.draws):
            torch.manual_seed(seed)
            draws.append(PARTS[part](args, Setting(args, seed)))
        results[part] = {"machine": machine(args.device), "settings": settings(part, options), "rows": averages(draws)}
        show(part, results[part]["rows"])
        save_results(args.out, results)
    draw(results, args.figure)


def settings(part: str, options: dict) -> dict:
    """What a part was measured with: where a flag is not about it, what stands in its place."""
    width = options["width"] if part.endswith("narrow") else "of the weights" if part.endswith("compact") else 320
    various = part.startswith(("reversal", "small_v")) and not part.endswith("compact")
    steps = options["steps"] if various else [1] if part == "chain" else [3]
    return options | {"width": width, "steps": steps}


def words(known) -> Callable[[str], list[str]]:
    """Reads a list of known words, separated by commas."""
    def read(text: str) -> list[str]:
        chosen = text.split(",")
        for word in chosen:
            if word not in known:
                raise argparse.ArgumentTypeError(f"{word!r} is not one of {', '.join(known)}")
        return chosen
    return read


PARTS = {f"{measure.__name__}_{name}": partial(measure, name)
         for measure in (reversal, small_v, half, ablate) for name in ("narrow", "compact", "full")
         if (measure, name) != (reversal, "compact")} | {"chain": chain}
HOURS = ("reversal_full", "small_v_full", "ablate_full")  # on a CPU
DEFAULT_PARTS = [part for part in PARTS if part not in HOURS]

if __name__ == "__main__":
    run(main)
