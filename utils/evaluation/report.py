"""What a test prints and writes: a line a picture, a summary a set, one table, scores.csv, names of result pictures."""
import math
import sys
from pathlib import Path

from tqdm import tqdm

from utils.data.images import file_stem
from utils.errors import printable
from utils.evaluation.evaluate import Metrics, Result, Scores
from utils.evaluation.metrics import SSIM_WINDOW
from utils.files import csv_text, write_atomic


def result_file(result: Result) -> str:
    """Return NAME_PSNR_x_SSIM_y.png, as published."""
    return f"{file_stem(result.name)}_PSNR_{result.psnr:.2f}_SSIM_{result.ssim:.4f}.png"


def print_result(result: Result, label: str, metrics: Metrics) -> None:
    """Print a picture's line, and on stderr what is to be said of its scores."""
    name = printable(result.name)
    tqdm.write(f"{printable(label)}/{name}  {shown(result.scores, metrics)}  {result.seconds:.2f} s")
    sys.stdout.flush()
    if math.isnan(result.psnr):
        tqdm.write(f"warning: the reconstruction of {name} is not finite", file=sys.stderr)
    elif math.isnan(result.ssim):
        tqdm.write(f"note: {name} is smaller than SSIM's window of {SSIM_WINDOW}x{SSIM_WINDOW}, so that its SSIM and "
                   "the set's average are nan", file=sys.stderr)


def summary(scores: Scores, label: str, metrics: Metrics) -> str:
    """Return the line that ends a test set."""
    return (f"Average {shown(scores.values, metrics)}  {scores.seconds:.2f} s an image, "
            f"over {scores.count} picture{'s' if scores.count > 1 else ''} of {printable(label)}; "
            f"{scores.density:.4g} measurements a pixel")


def shown(values: dict[str, float], metrics: Metrics) -> str:
    """Return "PSNR: 30.12 dB  SSIM: 0.9123"."""
    return "  ".join(f"{metrics[name].label}: {metrics[name].show(value)}" for name, value in values.items())


def write_scores(path: Path, results: list[Result]) -> None:
    """Write name, scores and seconds of each picture in full precision; raises UserError where that is not possible."""
    first, second, *others = results[0].scores
    rows = [("name", first, second, "seconds", *others)]
    for result in results:
        one, two, *more = result.scores.values()
        rows.append((result.name, one, two, result.seconds, *more))
    write_atomic(path, csv_text(rows).encode())


def table(scores: dict[tuple[str, str], Scores], metrics: Metrics) -> str:
    """Return test sets in rows and measurements in columns; scores are by the names of both."""
    sets, columns = (list(dict.fromkeys(keys)) for keys in zip(*scores, strict=True))
    head = [f"{metric.label}{f' ({metric.unit})' if metric.unit else ''} {'↑' if metric.higher_is_better else '↓'}"
            for metric in metrics.values()]
    rows = [[" / ".join((*head, "seconds an image")), *columns]]
    for name in sets:
        rows.append([printable(name)])
        for cell in (scores[name, column] for column in columns):
            digits = [f"{cell.values[key]:.{metric.digits}f}" for key, metric in metrics.items()]
            rows[-1].append(" / ".join((*digits, f"{cell.seconds:.2f}")))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n" + "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
