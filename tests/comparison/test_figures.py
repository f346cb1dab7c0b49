"""Figures: where they look, how large what they show is, and what stands beneath."""
import re
import zlib
from dataclasses import replace
from pathlib import Path

import cv2
import matplotlib
import numpy as np
import pytest

from utils.comparison.compare import Comparison, score_method
from utils.comparison.figures import PAGE_WIDTH, STYLE, Strip, check_region, differing_region, draw, write_figures
from utils.comparison.tables import Value
from utils.data.testsets import Picture
from utils.errors import UserError

RNG = np.random.default_rng(0)


def test_the_region_is_where_the_methods_differ_most():
    """Two methods that differ in one square alone, another square being equally wrong in both."""
    truth = RNG.integers(0, 256, (100, 140), dtype=np.uint8)
    a = truth.copy()
    a[60:80, 90:110] ^= 255
    b = a.copy()
    b[20:40, 15:35] ^= 128
    assert differing_region(truth, [a, b]) == (15, 20, 20, 20)
    assert differing_region(truth, [a, b, b]) == (15, 20, 20, 20)
    assert differing_region(truth, [a]) == (90, 60, 20, 20)  # of one method, where it is wrong
    corner = truth.copy()
    corner[-20:, -20:] ^= 255
    assert differing_region(truth, [corner]) == (120, 80, 20, 20)
    assert differing_region(truth[:1, :1], [truth[:1, :1]]) == (0, 0, 1, 1)


@pytest.mark.parametrize("region, wrong", [((0, 0, 10, 10), ""), ((90, 30, 10, 10), ""), ((91, 0, 10, 10), "beyond"),
                                           ((0, 31, 10, 10), "beyond"), ((0, 0, 50, 10), "nothing to enlarge"),
                                           ((0, 0, 10, 20), "nothing to enlarge"), ((0, 0, 49, 19), "")])
def test_a_region_lies_in_the_picture_and_leaves_room(region, wrong):
    picture = Picture("p", np.zeros((40, 100), np.uint8))
    if wrong:
        with pytest.raises(UserError, match=f"{wrong} .*p, which is 100 wide and 40 high"):
            check_region(region, [picture])
    else:
        check_region(region, [picture])


def rendered(figure, dpi: int = 200) -> np.ndarray:
    figure.set_dpi(dpi)
    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())[..., :3].astype(int)


@pytest.mark.parametrize("region", [(10, 20, 16, 16), (70, 60, 12, 24), (80, 0, 20, 10)])
@pytest.mark.parametrize("shape", [(100, 100), (100, 100, 3)])
def test_the_region_is_shown_twice_the_second_time_larger(region, shape):
    """Of a picture that is red or white in the region alone: its area, and half the tile's side along the longer."""
    x, y, w, h = region
    tile = np.full(shape, 40, np.uint8)
    tile[y:y + h, x:x + w] = 255 if tile.ndim == 2 else (255, 0, 0)
    with matplotlib.rc_context(STYLE):
        figure = draw([Strip([tile, tile], ["Ground truth", "m"], [[Value("")], [Value("")]], region)])
    pixels = rendered(figure)
    side = 1.73 * 200  # pixels of a tile
    shown = (pixels[:int(side), :int(side)] == tile[y, x]).all(axis=-1).sum()
    zoom = 0.5 * min(100 / w, 100 / h)
    expected = w * h * (1 + zoom**2) * (side / 100) ** 2
    assert 0.8 * expected < shown < expected  # the marks' lines hide some
    assert figure.get_size_inches()[0] == pytest.approx(3.5)  # one column


def test_the_enlargement_does_not_hide_the_region():
    yellow = np.array([0xff, 0xd4, 0])
    for x, y in ((5, 5), (75, 5), (5, 75), (75, 75), (40, 5), (40, 75)):
        tile = np.full((100, 100), 40, np.uint8)
        tile[y:y + 20, x:x + 20] = 255
        with matplotlib.rc_context(STYLE):
            pixels = rendered(draw([Strip([tile], ["t"], [[Value("")]], (x, y, 20, 20))]))
        seen = pixels[int((y + 4) * 3.46):int((y + 16) * 3.46), int((x + 4) * 3.46):int((x + 16) * 3.46)]
        assert (seen == 255).all()
        assert (np.abs(pixels - yellow).max(axis=-1) < 8).any()


def comparison(tmp_path: Path, names: list[str], shape=(60, 80)) -> tuple[Comparison, Picture]:
    picture = Picture("pic ü", RNG.integers(50, 200, shape, dtype=np.uint8))
    methods = []
    for k, name in enumerate(names):
        (tmp_path / str(k)).mkdir()
        cv2.imencode(".png", picture.luminance + 5 * k + 5)[1].tofile(tmp_path / str(k) / "pic ü.png")
        methods.append(score_method(name, tmp_path / str(k), [picture]))
    return Comparison("Set", 0.1, [picture.name], methods), picture


@pytest.mark.parametrize("count, width", [(1, 3.5), (3, 7.04), (13, 7.16)])
def test_files_are_as_wide_as_a_page_and_hold_no_type_3_fonts(tmp_path, monkeypatch, count, width):
    monkeypatch.setattr("utils.comparison.figures.DPI", 100)
    names = ["plain", "$x_1$", "a name so long that it would not fit beneath its picture (CVPR 2025)"]
    compared, picture = comparison(tmp_path, (names * 5)[:count])
    ((name, region),) = write_figures(tmp_path / "out", compared, [picture]).items()
    assert name == picture.name
    assert region[2:] == (12, 12)
    pdf = (tmp_path / "out" / "pic ü.pdf").read_bytes()
    (box,) = re.findall(rb"/MediaBox \[ ?0 0 ([\d.]+) ([\d.]+) ?\]", pdf)
    assert float(box[0]) / 72 == pytest.approx(width, abs=0.01)
    assert float(box[0]) / 72 <= PAGE_WIDTH + 1e-3
    png = cv2.imdecode(np.fromfile(tmp_path / "out" / "pic ü.png", np.uint8), cv2.IMREAD_COLOR)
    assert png.shape[1] == pytest.approx(width * 100, abs=2)
    streams = [zlib.decompressobj().decompress(part) for part in re.findall(
        rb"stream\r?\n(\x78.*?)endstream", pdf, re.DOTALL)]
    whole = pdf + b"".join(streams)
    assert b"/Type3" not in whole
    assert b"/FontFile2" in whole
    assert (png[:, [0, -1]] != 255).any(axis=(0, 2)).all()  # it fills its width, with no margin of its own


def test_names_may_be_as_long_as_file_systems_take(tmp_path, monkeypatch):
    monkeypatch.setattr("utils.comparison.figures._rendered", lambda figure, suffix: b"")
    compared, picture = comparison(tmp_path, ["plain"])
    write_figures(tmp_path / "out", compared, [replace(picture, name="n" * 250 + ".jpeg")])
    assert len(list((tmp_path / "out").rglob("*.*"))) == 4


def test_names_and_scores_stand_beneath_the_best_in_bold(tmp_path):
    compared, picture = comparison(tmp_path, ["first", "$second"])
    caught = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("utils.comparison.figures._rendered", lambda figure, suffix: caught.append(figure) or b"")
        write_figures(tmp_path / "out", compared, [picture, replace(picture, name="other")])
    texts = [[(text.get_text(), text.get_weight()) for text in axes.texts] for axes in caught[0].axes]
    (p, s), (q, t) = [score[1:3] for method in compared.methods for score in method.scores.values()]
    assert p == pytest.approx(34.1514, abs=1e-4)  # 20 log10(255 / 5)
    assert texts == [
        [("Ground truth", "normal"), ("PSNR (dB) / SSIM", "normal")],
        [("first", "normal"), (f"{p:.2f}", "bold"), (" / ", "normal"), (f"{s:.4f}", "bold")],
        [("$second", "normal"), (f"{q:.2f}", "normal"), (" / ", "normal"), (f"{t:.4f}", "normal")]]
    # A figure of the errors, offsets 5 and 10: as bright as half of the largest error, and as the largest.
    errors = caught[2]
    assert errors.axes[0].texts[1].get_text() == "errors from 0, black, to 10"
    colours = (matplotlib.colormaps["inferno"](np.array([0.5, 1.0]))[:, :3] * 255).astype(np.uint8)
    for axes, colour in zip(errors.axes[1:], colours, strict=True):
        assert (axes.images[0].get_array() == colour).all()
    # And one of both pictures together, the second of which no method has.
    assert [[text.get_text() for text in axes.texts][:2] for axes in caught[-1].axes] == [
        ["Ground truth", "PSNR (dB) / SSIM"], ["first", f"{p:.2f}"], ["$second", f"{q:.2f}"],
        ["Ground truth", "PSNR (dB) / SSIM"], ["no picture", "first"], ["no picture", "$second"]]
    assert caught[-1].get_size_inches() == pytest.approx((3 * 1.73 + 2 * 0.04, 2 * (1.73 * 60 / 80 + 0.3)))
    assert len(caught) == 2 * (2 + 2 + 1)


def test_a_method_without_the_picture_keeps_its_place(tmp_path):
    with matplotlib.rc_context(STYLE):
        figure = draw([Strip([np.zeros((20, 20), np.uint8), None], ["Ground truth", "m"],
                             [[Value("PSNR (dB) / SSIM")], [Value("-")]], (0, 0, 4, 4))])
    assert [text.get_text() for text in figure.axes[1].texts] == ["no picture", "m", "-"]
