"""A comparison as one HTML file that needs nothing else: tables to sort, and any two pictures under a slider.

The pictures are PNGs within the file, and its policy forbids it to load anything. What is in it is in report.html.
"""
import base64
import html
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import cv2
import numpy as np

from utils.comparison.compare import Comparison, shown_pixels
from utils.comparison.tables import averages_table, notes, pictures_table, remark_lines
from utils.data.images import read_picture
from utils.data.testsets import Picture
from utils.files import write_atomic

TEMPLATE = Path(__file__).with_name("report.html")
TRUTH = "Ground truth"


def write_report(
    path: Path,
    comparison: Comparison,
    pictures: list[Picture],  # the test set, in the comparison's order
    first: list[int],  # the pictures shown first, as indices; the others follow
    megabytes: float,  # of pictures at most; what comes later is left out, its scores are not
) -> list[int]:
    """Write the report atomically; returns the indices of the pictures that it shows.

    Raises UserError where it cannot be written.
    """
    shown = []

    def write(file: BinaryIO) -> None:
        room = megabytes * 1e6
        for part in re.split(r"(\{\{\w+\}\})", TEMPLATE.read_text(encoding="utf-8")):
            if part == "{{pictures}}":
                for k, script in _embedded(comparison, pictures, first):
                    room -= len(script)
                    if room < 0:
                        break
                    file.write(script)
                    shown.append(k)
            elif part == "{{data}}":
                file.write(_json(_data(comparison, pictures, shown)).encode())
            else:
                file.write((html.escape(comparison.title) if part == "{{title}}" else part).encode())

    write_atomic(path, write)
    return shown


def _embedded(comparison: Comparison, pictures: list[Picture], first: list[int]) -> Iterator[tuple[int, bytes]]:
    """Yield each picture's index, and an element with its ground truth and what the methods made of it."""
    for k in dict.fromkeys([*first, *range(len(pictures))]):
        picture = pictures[k]
        scores = [method.scores.get(picture.name) for method in comparison.methods]
        sources = [_png(shown_pixels(picture.luminance, picture.ycrcb)),
                   *(score and _png(shown_pixels(*read_picture(score.file))) for score in scores)]
        yield k, f'<script type="application/json" id="picture-{k}">{_json(sources)}</script>\n'.encode()


def _data(comparison: Comparison, pictures: list[Picture], shown: list[int]) -> dict[str, Any]:
    total, lines = len(pictures), notes(comparison)
    if len(shown) < total:
        lines.append(f"The pictures of {len(shown)} of {total} are in this file, the scores of all; compare.py's "
                     "--report_size makes room for more, and --pictures says which come first.")
    return {
        "subtitle": f"{len(comparison.methods)} method{'s' * (len(comparison.methods) > 1)}, {total} picture"
                    f"{'s' * (total > 1)}, scored as they are in the files.",
        "pictures": comparison.pictures,
        "sizes": [picture.luminance.shape for picture in pictures],
        "sources": [TRUTH, *(method.name for method in comparison.methods)],
        "shown": shown,
        "averages": _values(averages_table(comparison)),
        "table": _values(pictures_table(comparison)),
        "notes": lines,
        "remarks": remark_lines(comparison),
    }


def _values(table: list) -> list:
    return [[[value._asdict() for value in cell] for cell in row] for row in table]


def _png(pixels: np.ndarray) -> str:
    pixels = pixels if pixels.ndim == 2 else cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR)
    content = cv2.imencode(".png", pixels, [cv2.IMWRITE_PNG_COMPRESSION, 6])[1].tobytes()
    return "data:image/png;base64," + base64.b64encode(content).decode()


def _json(value: Any) -> str:
    """JSON that cannot end the element it stands in."""
    return json.dumps(value).replace("<", "\\u003c")
