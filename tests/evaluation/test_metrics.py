"""PSNR against its closed form and OpenCV's; SSIM against its closed form and another implementation of it."""
import math

import cv2
import numpy as np
import pytest
import skimage.data

from tests.conftest import ROOT
from utils.data.images import read_picture
from utils.evaluation.metrics import psnr, ssim


@pytest.fixture
def picture() -> np.ndarray:
    return cv2.GaussianBlur(np.random.default_rng(0).integers(0, 256, (48, 40), dtype=np.uint8), (5, 5), 0)


@pytest.mark.parametrize("offset", [0.25, 1, 16])
def test_psnr_of_a_constant_error(offset):
    reference = np.full((20, 30), 100, np.uint8)
    assert psnr(reference, reference + np.float32(offset)) == pytest.approx(20 * math.log10(255 / offset), abs=1e-9)
    assert psnr(reference, reference - np.float64(offset)) == pytest.approx(20 * math.log10(255 / offset), abs=1e-9)


def test_psnr_is_opencvs_on_whole_numbers(picture):
    other = np.random.default_rng(1).integers(0, 256, picture.shape, dtype=np.uint8)
    assert psnr(picture, other.astype(np.float32)) == pytest.approx(cv2.PSNR(picture, other), abs=1e-6)


def test_equal_pictures(picture):
    assert psnr(picture, picture.astype(np.float32)) == math.inf
    assert ssim(picture, picture.astype(np.float32)) == 1


def test_ssim_of_two_flat_pictures():
    a, b, c1 = 100.0, 120.0, (0.01 * 255) ** 2  # flat: the term of contrast and structure is 1
    expected = (2 * a * b + c1) / (a**2 + b**2 + c1)
    assert ssim(np.full((16, 16), a, np.uint8), np.full((16, 16), b)) == pytest.approx(expected, abs=1e-9)


def test_ssim_is_wang_and_colleagues_formula_on_7x7_windows(picture):
    other = picture + np.random.default_rng(1).normal(0, 9, picture.shape)
    x, y = (np.lib.stride_tricks.sliding_window_view(p.astype(float), (7, 7)) for p in (picture, other))
    axes, c1, c2 = (-2, -1), (0.01 * 255) ** 2, (0.03 * 255) ** 2
    mean_x, mean_y = x.mean(axes), y.mean(axes)
    covariance = ((x - mean_x[..., None, None]) * (y - mean_y[..., None, None])).sum(axes) / 48
    similarity = ((2 * mean_x * mean_y + c1) * (2 * covariance + c2)
                  / ((mean_x**2 + mean_y**2 + c1) * (x.var(axes, ddof=1) + y.var(axes, ddof=1) + c2)))
    assert ssim(picture, other) == pytest.approx(similarity.mean(), abs=1e-9)


def test_scores_are_those_of_the_definition_in_readme(tmp_path):
    """Y = 0.299 R + 0.587 G + 0.114 B over 0-255, of every pixel; MATLAB's, over 16-235, scores 20 lg(255/219) dB more.
    """
    rgb, recovered = skimage.data.astronaut()[:90, :81], skimage.data.astronaut()[1:91, :81]
    cv2.imwrite(str(tmp_path / "a.png"), rgb[..., ::-1])
    y, other = (picture @ np.array([0.299, 0.587, 0.114]) for picture in (rgb, recovered))
    found = psnr(read_picture(tmp_path / "a.png")[0], other)
    assert found == pytest.approx(10 * math.log10(255**2 / ((y.round() - other) ** 2).mean()), abs=1e-3)
    matlab = 10 * math.log10(255**2 / (((y.round() - other) * 219 / 255) ** 2).mean())
    assert matlab - found == pytest.approx(1.32, abs=0.01)
    readme = " ".join((ROOT / "README.md").read_text().split())
    for words in ("OpenCV's full-range BT.601; MATLAB's Y scores 1.3 dB higher", "no border cropped",
                  "uniform 7×7 window"):
        assert words in readme


def test_ssim_is_not_defined_below_its_window():
    assert math.isnan(ssim(np.zeros((6, 50), np.uint8), np.zeros((6, 50))))
    assert ssim(np.zeros((7, 7), np.uint8), np.zeros((7, 7))) == 1


def test_nan_shows_in_the_scores(picture):
    broken = picture.astype(np.float32)
    broken[10, 10] = np.nan
    assert math.isnan(psnr(picture, broken))
    assert math.isnan(ssim(picture, broken))


@pytest.mark.parametrize("score", [psnr, ssim])
def test_shapes_must_agree(score, picture):
    with pytest.raises(ValueError, match=r"\(48, 39\).*\(48, 40\)"):
        score(picture, picture[:, :-1])
