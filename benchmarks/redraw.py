"""Draw every picture of README anew, from the results that are in the repository.

    python benchmarks/redraw.py
    python benchmarks/redraw.py psnr.png teaser.png
"""
import json
import sys
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import (  # noqa: E402
    architecture,
    gradient_fidelity_report,
    memory,
    operators_report,
    reverse_anything_report,
    screenshots,
    teaser,
)
from benchmarks.pictures import plt, save  # noqa: E402
from utils.comparison.published import RATIOS, published_averages  # noqa: E402

FIGURES = ROOT / "figs"


def results(name: str) -> dict:
    return json.loads((ROOT / f"{name}.json").read_text(encoding="utf-8"))


def psnr(measured: dict, path: Path) -> None:
    """PSNR against ratio: the compact weights as a line, published averages as marks."""
    figure, (row,) = plt.subplots(1, len(measured["scores"]), figsize=(12, 4.2), layout="constrained", sharey=True,
                                  squeeze=False)
    percent = [100 * ratio for ratio in RATIOS]
    for axes, (testset, scores) in zip(row, measured["scores"].items(), strict=True):
        published = {}
        for ratio in RATIOS:
            for method in published_averages(testset, ratio):
                published.setdefault(method.name, []).append((100 * ratio, method.psnr))
        markers = zip("v^<>spDh", range(-4, 4), strict=True)  # side by side, or they would hide each other
        for name, points in published.items():
            (marker, place), size = (("*", 0), 10) if name.startswith("IDM") else (next(markers), 5)
            axes.plot([percent + 0.8 * place for percent, _ in points], [value for _, value in points], marker,
                      markersize=size, label=f"{name}, published")
        ours = [scores[str(ratio)]["psnr"] for ratio in RATIOS]
        axes.plot(percent, ours, "k-o", label="compact weights, measured here")
        axes.set(title=testset, xlabel="ratio, %", xticks=percent)
        axes.grid(alpha=0.3)
    row[0].set_ylabel("average PSNR of Y, dB")
    figure.legend(*row[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    save(figure, path)


def time(training: dict, inference: dict, path: Path) -> None:
    """Seconds of a training step, and of a reconstruction."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.2), layout="constrained")
    settings = training["settings"]
    steps = {"as published" if name == "published" else name: row["seconds"]
             for name, row in training["results"].items() if name != "forward only"}
    bars(left, steps, f"training step, width {settings['width']}, {settings['batch_size']} of "
                      f"{settings['crop']}×{settings['crop']}, T = {settings['step_number']}", training["machine"])
    height, width = inference["settings"]["size"]
    images = {name: row["seconds"] for name, row in inference["results"].items()}
    bars(right, images, f"a {height}×{width} picture, width {inference['settings']['width']}", inference["machine"])
    save(figure, path)


def bars(axes: plt.Axes, seconds: dict[str, float], title: str, machine: dict) -> None:
    labels = axes.barh(list(seconds), list(seconds.values()), color="#6fa8dc")
    axes.bar_label(labels, fmt="%.2f", padding=2, fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(f"seconds on {machine['device']}, {machine['threads']} threads", fontsize=8)


DRAWINGS = {
    "architecture.png": architecture.draw,
    "psnr.png": lambda path: psnr(results("weight/compact/scores"), path),
    "memory.png": lambda path: memory.draw(results("benchmarks/memory"), path),
    "time.png": lambda path: time(results("benchmarks/training_step"), results("benchmarks/inference"), path),
    "gradient_fidelity.png": lambda path: gradient_fidelity_report.draw(results("benchmarks/gradient_fidelity"), path),
    "app.png": screenshots.app,
    "report.png": screenshots.report,
    "operators.png": operators_report.draw,
    "reverse_anything.png": lambda path: reverse_anything_report.draw(results("benchmarks/reverse_anything"), path),
    "teaser.png": teaser.draw,
}


def main(folder: Path = FIGURES, names: Iterable[str] = DRAWINGS) -> None:
    for name in names:
        DRAWINGS[name](folder / name)
        print(folder / name)


if __name__ == "__main__":
    main(names=sys.argv[1:] or DRAWINGS)
