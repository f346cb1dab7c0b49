"""The tables of a comparison: for the terminal, as CSV, Markdown and LaTeX, with the best and the second marked.

What is equal as printed is equal in rank. CSV alone has all digits.
"""
import re
import textwrap
from collections.abc import Iterable
from typing import NamedTuple

from utils.comparison.compare import PSNR_TOLERANCE, Average, Comparison, Method, gap, rounding_effect
from utils.errors import listed, printable
from utils.files import csv_text

DEFINITION = ("Scores are those of Y, OpenCV's full-range BT.601 luminance, over the whole picture: PSNR with peak 255 "
              "(MATLAB's Y, from 16 to 235, gives 1.3 dB more) and SSIM with scikit-image's uniform 7x7 window.")
WIDTH = 100  # columns of a terminal
NONE = "-"
CLIPPING = 0.5  # dB; converting a colour reconstruction to RGB has been seen to change its PSNR by 0.14 dB


class Value(NamedTuple):
    text: str
    rank: int = 0  # 1 for the best, 2 for the second


Cell = list[Value]  # mostly one; PSNR and SSIM where a cell has both
Table = list[list[Cell]]  # the first row is the head, the first column names


def ranked(
    values: Iterable[float | None],  # None is shown as `-`
    decimals: int,
    among: int | None = None,  # only the first so many are ranked; all of them, if not given
) -> list[Value]:
    """Return numbers as text with their ranks. Where there are fewer than two numbers, none is best."""
    texts = [NONE if value is None else f"{value:.{decimals}f}" for value in values]
    numbers = [float(text) for text in texts[:among] if text not in (NONE, "nan")]
    best = sorted(set(numbers), reverse=True)[:2] if len(numbers) > 1 else []
    ranks = [best.index(float(text)) + 1 if text != NONE and float(text) in best else 0 for text in texts[:among]]
    return [Value(text, rank) for text, rank in zip(texts, ranks + [0] * (len(texts) - len(ranks)), strict=True)]


def averages_table(comparison: Comparison) -> Table:
    """Return methods in rows, then published averages, then what test.py recorded before rounding, never ranked.

    Where the methods do not all have the same pictures, averages over the common ones follow, and are ranked instead.
    """
    methods, published, common = comparison.methods, comparison.published, comparison.common
    own, shared = ([method.average(names) for method in methods] for names in (None, common))
    recorded = [method for method in methods if method.recorded]
    total = len(comparison.pictures)
    names = ["method", *(method.name for method in methods), *(f"{row.name}, published" for row in published),
             *(f"{method.name}, in scores.csv" for method in recorded)]
    over = ["pictures", *(f"{average.count} of {total}" for average in own), *(NONE for _ in published),
            *(f"{len(method.recorded)} of {total}" for method in recorded)]
    before = [method.recorded_average() for method in recorded]
    psnr = _numbers(own, 0) + [row.psnr for row in published] + _numbers(before, 0)
    ssim = _numbers(own, 1) + [None] * len(published) + _numbers(before, 1)
    # What is published is of all pictures, and comparable with averages over all alone.
    among = 0 if not comparison.alike else len(own) + (len(published) if len(common) == total else 0)
    columns = [map(Value, names), [Value("PSNR (dB)"), *ranked(psnr, 2, among)],
               [Value("SSIM"), *ranked(ssim, 4, among)], map(Value, over)]
    if not comparison.alike:
        for k, (score, decimals) in enumerate((("PSNR", 2), ("SSIM", 4))):
            values = _numbers(shared, k) + [None] * (len(published) + len(recorded))
            columns.append([Value(f"{score}, {len(common)} common"), *ranked(values, decimals)])
    return [[[value] for value in row] for row in zip(*columns, strict=True)]


def overview_table(comparisons: list[Comparison]) -> Table:
    """Return methods and published averages in rows, test sets and ratios in columns, over the common pictures."""
    columns = {}
    for comparison in comparisons:
        averages = [method.average(comparison.common) for method in comparison.methods]
        published, complete = comparison.published, len(comparison.common) == len(comparison.pictures)
        names = [*(method.name for method in comparison.methods), *(f"{row.name}, published" for row in published)]
        among = len(names) if complete else len(averages)
        psnr = ranked(_numbers(averages, 0) + [row.psnr for row in published], 2, among)
        ssim = ranked(_numbers(averages, 1) + [None] * len(published), 4, among)
        columns[comparison.title] = {name: [p] if s.text == NONE else [p, s]
                                     for name, p, s in zip(names, psnr, ssim, strict=True)}
    rows = sorted(dict.fromkeys(name for column in columns.values() for name in column),
                  key=lambda name: name.endswith(", published"))
    return [[[Value("PSNR (dB) / SSIM")], *([Value(title)] for title in columns)],
            *([[Value(name)], *(column.get(name, [Value(NONE)]) for column in columns.values())] for name in rows)]


def pictures_table(comparison: Comparison) -> Table:
    """Return pictures in rows, methods in columns, PSNR and SSIM in each cell."""
    table = [[[Value(name)] for name in ("PSNR (dB) / SSIM", *(method.name for method in comparison.methods))]]
    for name in comparison.pictures:
        scores = [method.scores.get(name) for method in comparison.methods]
        psnr = ranked((score and score.psnr for score in scores), 2)
        ssim = ranked((score and score.ssim for score in scores), 4)
        cells = ([p, s] if score else [p] for score, p, s in zip(scores, psnr, ssim, strict=True))
        table.append([[Value(name)], *cells])
    return table


def notes(comparison: Comparison) -> list[str]:
    """Return what must be known to read the averages, one sentence each."""
    common, total = comparison.common, len(comparison.pictures)
    lines = [DEFINITION]
    if len(common) == total:
        lines.append(f"Averages are over all of {comparison.testset}: {total} picture{'s' * (total > 1)}.")
    elif not common:
        lines.append("No picture was scored for all methods, so that no average compares.")
    else:
        left_out = [name for name in comparison.pictures if name not in common]
        which = f"all but {', '.join(left_out)}" if len(left_out) <= len(common) else ", ".join(common)
        lines.append(f"Best and second are told by the {len(common)} of {total} pictures that all methods have: "
                     f"{which}.")
    if none := [method.name for method in comparison.methods if not method.scores]:
        lines.append(f"No picture of {listed(none)} could be scored.")
    if comparison.published:
        lines.append("Published averages are copied from the IDM paper's table, not measured here; all but IDM measure "
                     "each block by itself, most with a learned matrix.")
        if len(common) < total:
            lines.append("Published averages are over complete test sets, and so not ranked with these.")
    return lines + [_agreement(method) for method in comparison.methods if method.recorded]


def remark_lines(comparison: Comparison) -> list[str]:
    """Return all remarks, one line for each method and kind."""
    return [f"{method.name}: {kind} ({len(texts)}): {'; '.join(texts)}" for method in comparison.methods
            for kind in dict.fromkeys(remark.kind for remark in method.remarks)
            for texts in [[remark.text for remark in method.remarks if remark.kind == kind]]]


def terminal(table: Table) -> str:
    """Return a table aligned, at most WIDTH wide: what does not fit beside the names goes below, names first again."""
    rows = [["  ".join(value.text + " *+"[value.rank] for value in cell) if r and c else _short(cell[0].text)
             for c, cell in enumerate(row)] for r, row in enumerate(table)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    blocks, used = [[]], WIDTH
    for c in range(1, len(widths)):
        if used + widths[c] + 2 > WIDTH:
            blocks.append([])
            used = widths[0]
        blocks[-1].append(c)
        used += widths[c] + 2
    return "\n\n".join("\n".join("  ".join(row[c].ljust(widths[c]) for c in (0, *block)).rstrip() for row in rows)
                       for block in blocks[1:])


def wrapped(lines: Iterable[str]) -> str:
    """Return long lines for a terminal, each wrapped and its continuation indented, with nothing that it would obey."""
    return "\n".join(textwrap.fill(printable(line), WIDTH, subsequent_indent="  ", break_long_words=False,
                                   break_on_hyphens=False) for line in lines)


def markdown(title: str, tables: list[Table], *lists: list[str]) -> str:
    """Return a title, tables with the best bold and the second underlined, and lists of remarks."""
    parts = [f"# {_markdown_text(title)}"]
    for table in tables:
        lines = ["| " + " | ".join(" / ".join(("{}", "**{}**", "<u>{}</u>")[value.rank].format(
            _markdown_text(value.text)) for value in cell) for cell in row) + " |" for row in table]
        lines.insert(1, "| --- |" + " ---: |" * (len(table[0]) - 1))
        parts.append("\n".join(lines))
    parts += ["\n".join(f"- {_markdown_text(line)}" for line in lines) for lines in lists if lines]
    return "\n\n".join(parts) + "\n"


def latex(table: Table, apart: int = 0) -> str:
    r"""Return a tabular for \usepackage{booktabs}, best bold, second underlined; the last rows `apart` below a rule."""
    lines = ["% \\usepackage{booktabs}", f"\\begin{{tabular}}{{l{'c' * (len(table[0]) - 1)}}}", "\\toprule"]
    for r, row in enumerate(table):
        if r == 1 or (apart and r == len(table) - apart):
            lines.append("\\midrule")
        lines.append(" & ".join(" / ".join(("{}", "\\textbf{{{}}}", "\\underline{{{}}}")[value.rank].format(
            _latex_text(value.text)) for value in cell) for cell in row) + " \\\\")
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}"]) + "\n"


def scores_csv(comparison: Comparison) -> str:
    """Return one row for each picture and method, scored or not, and for each file that shows none."""
    rows = []
    for method in comparison.methods:
        told = [(remark, f"{remark.kind}: {remark.text}") for remark in method.remarks]
        for name, score in method.scores.items():
            claims = "; ".join(text for remark, text in told if (remark.kind, remark.picture) == ("claim", name))
            rows.append((method.name, name, score.psnr, score.ssim, *method.recorded.get(name, ("", "")),
                         score.file.name, claims))
        rows += [(method.name, remark.picture, "", "", "", "", remark.file, text) for remark, text in told
                 if remark.kind != "claim"]
    return csv_text([("method", "picture", "psnr", "ssim", "recorded_psnr", "recorded_ssim", "file", "remark"), *rows])


def averages_csv(comparisons: list[Comparison]) -> str:
    """Return one row for each test set, ratio, and method or published average."""
    rows = []
    for comparison in comparisons:
        at = (comparison.testset, comparison.cs_ratio)
        rows += [(*at, method.name, "measured", *method.average(), *method.average(comparison.common))
                 for method in comparison.methods]
        rows += [(*at, row.name, "published", row.psnr, "", "", "", "", "") for row in comparison.published]
        rows += [(*at, method.name, "scores.csv", *method.recorded_average(), "", "", "")
                 for method in comparison.methods if method.recorded]
    head = ("testset", "cs_ratio", "method", "source", "psnr", "ssim", "pictures", "common_psnr", "common_ssim",
            "common_pictures")
    return csv_text([head, *rows])


def _agreement(method: Method) -> str:
    """Return how far the scores of the written pictures are from those that test.py recorded."""
    scores = method.scores
    gaps = {name: (gap(scores[name].psnr, recorded.psnr), gap(scores[name].ssim, recorded.ssim))
            for name, recorded in method.recorded.items()}
    worst = max(gaps, key=lambda name: gaps[name][0])
    strange = [name for name, recorded in method.recorded.items() if gaps[name][0] > rounding_effect(recorded.psnr)
               + (CLIPPING if scores[name].colour else PSNR_TOLERANCE)]
    strange = f"; for {listed(strange)} that is more than either does: is it of these pictures?" if strange else "."
    return (f"{method.name}: scores.csv is from before the pictures were rounded to 8 bits and, in colour, clipped to "
            f"RGB; as written they differ from it by at most {gaps[worst][0]:.4f} dB ({worst}) and "
            f"{max(pair[1] for pair in gaps.values()):.4f} in SSIM{strange}")


def _numbers(averages: list[Average], k: int) -> list[float | None]:
    return [average[k] if average.count else None for average in averages]


def _short(text: str, longest: int = 40) -> str:
    text = " ".join(text.split())
    return text if len(text) <= longest else text[:longest - 1] + "…"


def _markdown_text(text: str) -> str:
    return re.sub(r"([\\`*_{}\[\]<>|#~&$])", r"\\\1", " ".join(text.split()))


def _latex_text(text: str) -> str:
    commands = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
                "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}"}
    text = " ".join(text.split())
    guard = "{}" if text.startswith(("[", "*")) else ""  # else the end of the row before would take it for an option
    return guard + re.sub(r'[\\~^<>|&%$#_{}]', lambda found: commands.get(found[0], "\\" + found[0]), text)
