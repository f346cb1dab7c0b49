"""The drawing of the architecture: every box of the U-Net is a module of a real network, under its name in the code.

    python benchmarks/architecture.py
"""
import sys
from pathlib import Path

import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.pictures import plt, save  # noqa: E402
from model import IDM  # noqa: E402
from model.couplings import WeightedCoupling  # noqa: E402

COLOURS = {"Resnet": "#cfe2f3", "Attention": "#fce5cd", "Injector": "#d9ead3", "SamplingStep": "#ead1dc"}
PLAIN = "#eeeeee"
LEGEND = """thick frame:
a coupling

thin frame:
outside the
chains

numbers: skips,
from right to
left edges; the
streams go on
past the first
merge_scales"""
STEP = 0.62  # from a box to the next one below
Point = tuple[float, float]
Box = tuple[float, float, float]  # left, middle of its height, width


def draw(path: Path) -> None:
    with torch.device("meta"):
        net = IDM()
    figure, axes = plt.subplots(figsize=(12.4, 10.8), layout="constrained")
    draw_chain(axes, net)
    draw_unet(axes, net)
    draw_block(axes, net.unet.down_blocks[0].chains[0])
    axes.set(xlim=(-0.2, 17.4), ylim=(-5.2, 10.7), aspect="equal")
    axes.axis("off")
    save(figure, path)


def draw_chain(axes: plt.Axes, net: IDM) -> None:
    """Level one."""
    heading(axes, 10.4, "Level one, IDM:  T sampling steps, a reversible chain of two images")
    start = box(axes, 0, 9.5, 2.6, "A⁺y")
    before = start
    for coupling, t in zip(net.steps, range(len(net.steps), 0, -1), strict=True):
        current = box(axes, before[0] + before[2] + 0.9, 9.5, 2.9, f"{type(coupling.body).__name__}, t = {t}",
                      COLOURS[type(coupling.body).__name__], reversible=isinstance(coupling, WeightedCoupling))
        arrows = ("√ᾱ_T",) if before is start else ("x", "h")
        for lane, label in enumerate(arrows):
            height = 9.5 + (0.13 - 0.26 * lane if len(arrows) > 1 else 0)
            arrow(axes, (before[0] + before[2], height), (current[0], height))
            axes.text((before[0] + before[2] + current[0]) / 2, height + (0.1 if lane == 0 else -0.28), label,
                      ha="center", fontsize=7)
        before = current
    end = box(axes, before[0] + before[2] + 0.9, 9.5, 2.3, "x + merge_scale · h")
    arrow(axes, (before[0] + before[2], 9.5), (end[0], 9.5))
    axes.text(0, 8.75, "SamplingStep:   ε = pixel_shuffle(UNet(pixel_unshuffle(x), A⁺y, operator, t));   "
              "x₀ = (x − √(1−ᾱ_t) ε) / √ᾱ_t;   x₀ ← x₀ − A⁺(A x₀ − y);   returns √ᾱ_{t−1} x₀ + √(1−ᾱ_{t−1}) ε",
              fontsize=8)


def draw_unet(axes: plt.Axes, net: IDM) -> None:
    """Level two, a column a block."""
    unet = net.unet
    narrow, wide = net.config.block_out_channels
    heading(axes, 8.1, f"Level two, UNet:  every block a reversible chain of two streams of features "
                       f"(widths {narrow} and {wide})")
    blocks = [("down_blocks[0]", unet.down_blocks[0]), ("down_blocks[1]", unet.down_blocks[1]),
              ("up_blocks[0]", unet.up_blocks[0]), ("up_blocks[1]", unet.up_blocks[1])]
    first = box(axes, 0, 6.9, 1.5, "conv_in")
    skips, taken = [1], 1  # by number
    badge(axes, first[0] + first[2], 6.9 + 0.22, 1)
    before = first
    for column, (name, block) in enumerate(blocks):
        left, width = 2.3 + 3.3 * column, 2.3
        axes.text(left + width / 2, 7.45, name, ha="center", fontsize=9, weight="bold")
        height = 6.9
        lead(axes, (before[0] + before[2], before[1]), (left, height))
        for module, label, reversible in parts(block):
            place = box(axes, left, height, width, label, COLOURS.get(type(module).__name__, PLAIN), reversible)
            if column < 2 and label.startswith(("merge", "downsample")):
                taken += 1
                skips.append(taken)
                badge(axes, left + width, height + 0.22, taken)
            elif column > 1 and type(module).__name__ == "Resnet":
                badge(axes, left, height + 0.22, skips.pop())
            height -= STEP
        before = place
    last = box(axes, 2.3 + 3.3 * 4, before[1], 1.5, "conv_norm_out")
    out = box(axes, last[0], before[1] - STEP, 1.5, "conv_out")
    arrow(axes, (before[0] + before[2], before[1]), (last[0], before[1]))
    arrow(axes, (last[0] + 0.75, last[1] - 0.22), (out[0] + 0.75, out[1] + 0.22))
    axes.text(0, 6.2, LEGEND, fontsize=8, va="top")


def parts(block: nn.Module) -> list[tuple[nn.Module | None, str, bool]]:
    """(module, what to write, whether it is a coupling), in the order they run."""
    found = [] if block.entry is None else [(block.entry, "entry: Resnet", False)]
    chains = getattr(block, "chains", None)
    for pair, chain in enumerate(chains if chains is not None else [block.chain]):
        found += [(coupling.body, type(coupling.body).__name__, True) for coupling in chain]
        found.append((None, f"merge_scales[{pair}]" if chains is not None else "merge_scale", False))
    for name in ("downsample", "upsample"):
        if getattr(block, name, None) is not None:
            found.append((getattr(block, name), name, False))
    return found


def draw_block(axes: plt.Axes, chain: nn.Module) -> None:
    """Draw the first chain of down_blocks[0] in detail: its two streams, from the split to the skip."""
    heading(axes, -1.95, "A block in detail, down_blocks[0]:  y₁ = (1 − v) f(x₁) + v x₂,  y₂ = x₁;  backward  "
                         "x₁ = y₂,  x₂ = (y₁ − (1 − v) f(y₂)) / v")
    top, bottom, left, length = -2.95, -4.05, 1.6, 3.05
    box(axes, 0, (top + bottom) / 2, 1.1, "x")
    for height, label, above in ((top, "x", 0.12), (bottom, "s·x", -0.28)):
        arrow(axes, (1.1, (top + bottom) / 2), (left, height))
        axes.text(left - 0.1, height + above, label, ha="right", fontsize=8)
    for coupling in chain:
        name = type(coupling.body).__name__
        place = box(axes, left + 0.65, top, 1.2, name, COLOURS[name], reversible=True)
        plus, right = left + 2.35, left + length
        arrow(axes, (left, top), (place[0], top))
        arrow(axes, (place[0] + place[2], top), (plus - 0.13, top))
        axes.text((place[0] + place[2] + plus) / 2 - 0.05, top + 0.1, "1−v", ha="center", fontsize=7)
        axes.add_patch(plt.Circle((plus, top), 0.13, facecolor="white", edgecolor="black", linewidth=1))
        axes.text(plus, top - 0.01, "+", ha="center", va="center", fontsize=9)
        axes.plot([plus + 0.13, right], [top, top], color="black", linewidth=1)
        arrow(axes, (left, bottom), (plus - 0.05, top - 0.13))
        axes.text(left + 0.42, bottom + 0.32, "v", ha="center", fontsize=7)
        axes.plot([left + 0.3, right], [top, bottom], color="black", linewidth=1)
        left = right
    end = box(axes, left + 0.5, (top + bottom) / 2, 1.5, "x₁ + m·x₂")
    for height in (top, bottom):
        arrow(axes, (left, height), (end[0], (top + bottom) / 2))
    axes.text(end[0] + end[2] / 2, (top + bottom) / 2 - 0.55, "skip 2", ha="center", fontsize=8)
    axes.text(0, -4.95, "Injector:   z = lift[t](pixel_shuffle(features)) is one image;   features + "
              "pixel_unshuffle(unlift[t]([z, A⁺A z, A⁺y]));   pixel_shuffle by 2 in down_blocks[0] and "
              "up_blocks[1], by 4 in the others", fontsize=8)


def heading(axes: plt.Axes, height: float, text: str) -> None:
    axes.text(0, height, text, fontsize=11, weight="bold")


def box(axes: plt.Axes, left: float, middle: float, width: float, text: str, colour: str = PLAIN,
        reversible: bool = False) -> Box:
    axes.add_patch(plt.Rectangle((left, middle - 0.22), width, 0.44, facecolor=colour, edgecolor="black",
                                 linewidth=1.6 if reversible else 0.5))
    axes.text(left + width / 2, middle, text, ha="center", va="center", fontsize=8)
    return left, middle, width


def badge(axes: plt.Axes, x: float, y: float, number: int) -> None:
    axes.add_patch(plt.Circle((x, y), 0.16, facecolor="#3d85c6", edgecolor="none", zorder=3))
    axes.text(x, y - 0.01, str(number), color="white", ha="center", va="center", fontsize=7, weight="bold", zorder=4)


def lead(axes: plt.Axes, start: Point, end: Point) -> None:
    """Out of the foot of a column, up between the two, into the head of the next."""
    middle = (start[0] + end[0]) / 2
    axes.plot([start[0], middle, middle], [start[1], start[1], end[1]], color="black", linewidth=1)
    arrow(axes, (middle, end[1]), end)


def arrow(axes: plt.Axes, start: Point, end: Point) -> None:
    axes.annotate("", end, start, arrowprops={"arrowstyle": "->", "lw": 1, "shrinkA": 0, "shrinkB": 0})


if __name__ == "__main__":
    draw(ROOT / "figs" / "architecture.png")
