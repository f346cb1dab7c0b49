"""The second paper's table from what reverse_anything.py measured, as Markdown, and its figure."""
import re
from pathlib import Path

from benchmarks.machine import save_table, table_row

PUBLISHED = [  # as printed in the two papers, at full width and with their own data; not measured here
    ("IDM, T = 3 (first paper)", "28.69 / 34.67 / 39.57 at 10 / 30 / 50 %", "-", "-",
     "up to 10.09 dB over DDNM, 14.54 times as fast as DDNM, up to 93.8 % less memory in training"),
    ("DDPM (second paper)", "28.5, ratio not stated", "0.872", "15.3", ""),
    ("second paper", "38.59, ratio not stated", "0.951", "4.7", "15 times as fast, 93.8 % less memory"),
]
BASE = "DDPM with DDNM"


def show(results: dict, report: Path, figure: Path) -> None:
    """Print the table, put it between the marks in the report (a new one where there is none), and draw the figure."""
    save_table(report, markdown(results), "Reverse Anything")
    draw(results, figure)


def markdown(results: dict) -> str:
    """Tables and the sentence that says what they were measured with."""
    settings, where = results["settings"], results["machine"]
    percents = [f"{100 * ratio:.10g}" for ratio in settings["cs_ratio"]]
    said = (f"{settings['pictures']} pictures of {settings['testset_name']}; each network trained from fresh weights "
            f"with {settings['teraflop']:g} TFLOP, which are the iterations below, on {settings['patch_size']}×"
            f"{settings['patch_size']} crops, seed {settings['seed']}; IDM of width {settings['width']}, shuffle "
            f"{settings['shuffle']}, no attention, T = {settings['step_number']}, one network for all ratios. "
            f"Seconds: CPU time of a thread, {where['device']}, for a 288×480 picture. Memory: what a training step "
            f"holds beside weights and gradients, counted.")
    titles = ["", *(f"{percent} %" for percent in percents), "s an image", "× DDNM's speed", "step, MB",
              "reversible, MB", "saved", "iterations"]
    lines = [f"**Measured here.** {said}", "", table_row(titles), table_row(["---"] * len(titles)),
             *(table_row(cells(results, name, percents)) for name in methods(results)), "",
             "**Published** (other networks, full width, GPUs; copied, not measured here).", "",
             *map(table_row, (["", "PSNR, CBSD68", "SSIM", "FID", "claims"], ["---"] * 5, *PUBLISHED))]
    return "\n".join(lines)


def methods(results: dict) -> list[str]:
    """Names of what was scored, "METHOD, n steps", in the order of the scores; the ratio is left off."""
    return list(dict.fromkeys(name.rpartition(", ")[0] for name in results["scores"]))


def cells(results: dict, method: str, percents: list[str]) -> list[str]:
    """A row of the table."""
    name, seconds = method.rpartition(", ")[0], results["seconds"]["an image"]
    scores = [results["scores"][f"{method}, {percent} %"] for percent in percents]
    slowest = seconds[max((other for other in seconds if other.startswith(BASE)), key=seconds.get)]
    own, title = seconds.get(method), re.sub(r"\b1 steps$", "1 step", method)
    plain, reversible = (results["held_mb"].get(f"{name}, {setting}") for setting in ("none", "both"))
    return [title, *(f"{score['psnr']:.2f} / {score['ssim']:.4f}" for score in scores),
            f"{own:.2f}" if own else "", f"{slowest / own:.1f}" if own else "",
            f"{plain:.1f}" if plain else "", f"{reversible:.1f}" if reversible else "",
            f"{100 * (1 - reversible / plain):.1f} %" if reversible else "",
            f"{results['training'][name]['iterations']:,}"]


def draw(results: dict, path: Path) -> None:
    """PSNR against seconds an image, a panel for each ratio; what lies up and left is better."""
    from benchmarks.pictures import plt, save

    seconds = results["seconds"]["an image"]
    ratios = [f"{100 * ratio:.10g}" for ratio in results["settings"]["cs_ratio"]]
    figure, (panels,) = plt.subplots(1, len(ratios), figsize=(4 * len(ratios), 4.2), squeeze=False,
                                     layout="constrained")
    for axes, percent in zip(panels, ratios, strict=True):
        for marker, method in zip("osd^v<>p*XPhD" * 3, seconds, strict=False):
            axes.semilogx(seconds[method], results["scores"][f"{method}, {percent} %"]["psnr"], marker, label=method)
        axes.set(title=f"{results['settings']['testset_name']}, {percent} %", xlabel="CPU seconds an image")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("average PSNR of Y, dB")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    save(figure, path)
