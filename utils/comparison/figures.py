"""Figures of a comparison for a paper: pictures' ground truth and reconstructions, with one region of each enlarged.

Each is as wide as a page of two columns, or narrower where few methods need less, and comes as PDF and PNG.
"""
import io
import math
import warnings
from dataclasses import dataclass
from pathlib import Path

import cv2
import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from utils.comparison.compare import Comparison, shown_pixels
from utils.comparison.tables import NONE, Value, ranked
from utils.data.images import file_stem, read_picture
from utils.data.testsets import Picture
from utils.errors import UserError
from utils.files import write_atomic

Region = tuple[int, int, int, int]  # x, y, width, height, in pixels from the top left

PAGE_WIDTH, LARGEST_TILE = 7.16, 1.73  # inches: IEEE's two-column page; two tiles fill one column, 3.5
MOST_COLUMNS = 7
GAP, CAPTION = 0.04, 0.3  # inches between tiles, and for the two lines beneath
INSET = 0.5  # the enlargement's longer side, at most this part of the tile's
DPI, SMALLEST_FONT = 600, 5.5
INSET_LINE = 1.4  # points
MARK = "#ffd400"  # seen on dark and on light ground
STYLE = {"font.family": ["STIXGeneral", "DejaVu Sans"], "font.size": 7.5, "pdf.fonttype": 42, "axes.linewidth": 0}


@dataclass
class Strip:
    """What a figure shows of one picture."""

    tiles: list[np.ndarray | None]  # the truth and the reconstructions: uint8 (H, W) or RGB (H, W, 3); None: missing
    names: list[str]  # stand beneath the tiles
    captions: list[list[Value]]  # stand beneath the names: parts side by side, those of rank 1 in bold
    region: Region  # is enlarged


def write_figures(
    folder: Path,
    comparison: Comparison,
    pictures: list[Picture],  # those to draw
    region: Region | None = None,  # what to enlarge in all of them; where the methods differ most, if not given
) -> dict[str, Region]:
    """Draw NAME.pdf and NAME.png for each picture, errors/NAME of the methods' errors, and all pictures as one figure.

    Returns what each picture's figure enlarges, by its name. Raises UserError where a file cannot be written.
    """
    strips = {picture.name: strips_of(comparison, picture, region) for picture in pictures}
    for name, (shown, errors) in strips.items():
        _write(folder / file_stem(name), [shown])
        _write(folder / "errors" / file_stem(name), [errors])
    if len(pictures) > 1:
        _write(folder.with_name(f"{folder.name}-together"), [shown for shown, _ in strips.values()])
    return {name: shown.region for name, (shown, _) in strips.items()}


def strips_of(comparison: Comparison, picture: Picture, region: Region | None) -> tuple[Strip, Strip]:
    """Return what to show of a picture: the reconstructions, and their absolute errors in luminance."""
    names = ["Ground truth", *(method.name for method in comparison.methods)]
    scores = [method.scores.get(picture.name) for method in comparison.methods]
    read = [read_picture(score.file) if score else None for score in scores]
    region = region or differing_region(picture.luminance, [entry[0] for entry in read if entry])
    scored = zip(ranked((score and score.psnr for score in scores), 2),
                 ranked((score and score.ssim for score in scores), 4), strict=True)
    captions = [[psnr, Value(" / "), ssim] if psnr.text != NONE else [psnr] for psnr, ssim in scored]
    errors = [entry and np.abs(entry[0].astype(int) - picture.luminance) for entry in read]
    most = max([1, *(np.percentile(error, 99.5) for error in errors if error is not None)])
    maps = [error if error is None else (matplotlib.colormaps["inferno"](error / most)[..., :3] * 255).astype(np.uint8)
            for error in errors]
    return (Strip([shown_pixels(picture.luminance, picture.ycrcb), *(entry and shown_pixels(*entry) for entry in read)],
                  names, [[Value("PSNR (dB) / SSIM")], *captions], region),
            Strip([shown_pixels(picture.luminance, picture.ycrcb), *maps], names,
                  [[Value(f"errors from 0, black, to {most:.0f}")], *captions], region))


def _write(path: Path, strips: list[Strip]) -> None:
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # a box in the figure says as much
        figure = draw(strips)
        for suffix in ("pdf", "png"):
            write_atomic(path.with_name(f"{path.name}.{suffix}"), _rendered(figure, suffix))


def check_region(region: Region, pictures: list[Picture]) -> None:
    """Raises UserError where a region does not lie in a picture, or is too large to be shown larger."""
    x, y, w, h = region
    for picture in pictures:
        height, width = picture.luminance.shape
        named = f"--region {x},{y},{w},{h}"
        size = f"{picture.name}, which is {width} wide and {height} high"
        if x + w > width or y + h > height:
            raise UserError(f"{named} reaches beyond {size}")
        if 2 * w >= width or 2 * h >= height:
            raise UserError(f"{named} leaves nothing to enlarge in {size}; choose less than half of each side")


def differing_region(
    truth: np.ndarray,  # luminance, uint8 (H, W)
    reconstructions: list[np.ndarray],  # the same of each method
) -> Region:
    """The square, a fifth of the shorter side, over which the methods' luminance varies most between them.

    Of a single method, it is where that differs most from the truth.
    """
    stack = np.stack(reconstructions if len(reconstructions) > 1 else [truth, *reconstructions]).astype(np.float64)
    side = max(1, round(min(truth.shape) / 5))
    # Sums over squares whose top left corner is the pixel.
    total = cv2.boxFilter(stack.var(axis=0), -1, (side, side), anchor=(0, 0), normalize=False)
    total = total[:truth.shape[0] - side + 1, :truth.shape[1] - side + 1]
    y, x = np.unravel_index(total.argmax(), total.shape)
    return int(x), int(y), side, side


def draw(strips: list[Strip]) -> Figure:
    """Return lines of tiles, one or more for each picture, with its region enlarged in each, for the style in force."""
    lines = [(strip, first) for strip in strips for first in range(0, len(strip.tiles), _columns(strip))]
    columns = max(map(_columns, strips))
    tile_width = min(LARGEST_TILE, (PAGE_WIDTH - (columns - 1) * GAP) / columns)
    heights = [tile_width * strip.tiles[0].shape[0] / strip.tiles[0].shape[1] for strip, _ in lines]
    size = (columns * tile_width + (columns - 1) * GAP, sum(heights) + len(lines) * CAPTION)
    figure, top = Figure(figsize=size), size[1]
    FigureCanvasAgg(figure)
    for (strip, first), height in zip(lines, heights, strict=True):
        for column, k in enumerate(range(first, min(first + _columns(strip), len(strip.tiles)))):
            axes = figure.add_axes((column * (tile_width + GAP) / size[0], (top - height) / size[1],
                                    tile_width / size[0], height / size[1]), xticks=[], yticks=[])
            _draw_tile(axes, strip, k)
        top -= height + CAPTION
    return figure


def _columns(strip: Strip) -> int:
    """Return how many tiles stand side by side, such that all lines have about as many."""
    return math.ceil(len(strip.tiles) / math.ceil(len(strip.tiles) / MOST_COLUMNS))


def _draw_tile(axes: Axes, strip: Strip, k: int) -> None:
    height, width = strip.tiles[0].shape[:2]
    axes.set(xlim=(0, width), ylim=(height, 0))
    if strip.tiles[k] is None:
        axes.set_facecolor("0.93")
        axes.text(0.5, 0.5, "no picture", transform=axes.transAxes, ha="center", va="center", color="0.35")
    else:
        _show(axes, strip.tiles[k], (0, 0, width, height))
        _enlarge(axes, strip.tiles[k], strip.region)
    _caption(axes, [Value(strip.names[k])], line=0)
    _caption(axes, strip.captions[k], line=1)


def _enlarge(axes: Axes, tile: np.ndarray, region: Region) -> None:
    """Mark the region, and show it again larger in the corner that hides least of it."""
    height, width = tile.shape[:2]
    x, y, w, h = region
    zoom = INSET * min(width / w, height / h)
    inset_width, inset_height = zoom * w, zoom * h
    corners = [(left, top) for top in (height - inset_height, 0) for left in (width - inset_width, 0)]

    def hidden(corner: tuple[float, float]) -> float:
        across = min(x + w, corner[0] + inset_width) - max(x, corner[0])
        down = min(y + h, corner[1] + inset_height) - max(y, corner[1])
        return max(across, 0) * max(down, 0)

    left, top = min(corners, key=hidden)
    crop = tile[y:y + h, x:x + w]
    fold = max(1, 400 // max(w, h))  # some viewers of PDF smooth what has few pixels
    _show(axes, crop.repeat(fold, axis=0).repeat(fold, axis=1), (left, top, inset_width, inset_height))
    line = {"fill": False, "edgecolor": MARK}
    axes.add_patch(Rectangle((x, y), w, h, linewidth=0.7, **line))
    edge = INSET_LINE / 2 * width / (72 * axes.bbox.width / axes.figure.dpi)  # half a line, inwards
    axes.add_patch(Rectangle((left + edge, top + edge), inset_width - 2 * edge, inset_height - 2 * edge,
                             linewidth=INSET_LINE, **line))


def _show(axes: Axes, pixels: np.ndarray, box: tuple[float, float, float, float]) -> None:
    x, y, width, height = box
    axes.imshow(pixels, cmap="gray", vmin=0, vmax=255, extent=(x, x + width, y + height, y), aspect="auto",
                interpolation="none")


def _caption(axes: Axes, parts: list[Value], line: int) -> None:
    """Write parts side by side beneath a tile, centred, those of rank 1 in bold, as large as its width allows."""
    texts = [part.text for part in parts]
    # Names are shown as they are: a $ starts no formula.
    written = [axes.annotate(text, (0.5, 0), (0, -2.5 - 9.5 * line), "axes fraction", textcoords="offset points",
                             va="top", annotation_clip=False, parse_math=False,
                             fontweight="bold" if part.rank == 1 else "normal")
               for part, text in zip(parts, texts, strict=True)]
    renderer, scale = axes.figure.canvas.get_renderer(), 72 / axes.figure.dpi

    def widths() -> list[float]:
        return [text.get_window_extent(renderer).width * scale for text in written]

    room = axes.bbox.width * scale
    while sum(widths()) > room and written[0].get_fontsize() > SMALLEST_FONT:
        for text in written:
            text.set_fontsize(text.get_fontsize() - 0.5)
    while (width := sum(widths())) > room and len(texts[0]) > 1:  # a name alone is ever so long
        texts[0] = texts[0][:max(1, min(len(texts[0]) - 1, int(len(texts[0]) * room / width)))]
        written[0].set_text(texts[0].rstrip() + "…")
    left = -sum(widths()) / 2
    for text, width in zip(written, widths(), strict=True):
        text.set_position((left, text.xyann[1]))
        left += width


def _rendered(figure: Figure, suffix: str) -> bytes:
    content = io.BytesIO()
    figure.savefig(content, format=suffix, dpi=DPI, metadata={"CreationDate": None} if suffix == "pdf" else None)
    return content.getvalue()
