"""Scores of methods degraded in known ways against closed forms, and what is said about files that have none."""
import csv
import errno
import math
import os

import cv2
import numpy as np
import pytest
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from utils.comparison.compare import Comparison, find_folder, gap, rounding_effect, score_method
from utils.data.images import write_reconstruction
from utils.data.testsets import Picture, load_testset
from utils.errors import UserError

RNG = np.random.default_rng(0)


def write(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imencode(path.suffix, np.asarray(pixels))[1].tofile(path)


@pytest.fixture
def testset(tmp_path) -> list[Picture]:
    """Three grey pictures and a colour one, whose values leave room for ±40."""
    for name, shape in (("img_1", (48, 64)), ("img_10", (40, 40)), ("Barbara", (64, 64)), ("colour", (33, 47, 3))):
        write(tmp_path / "data" / "set" / f"{name}.png", RNG.integers(60, 190, shape, dtype=np.uint8))
    return load_testset("set", tmp_path / "data")


def test_closed_forms_of_psnr(tmp_path, testset):
    """A constant offset d has 20 log₁₀(255/d) dB, and noise of deviation σ, rounded, 10 log₁₀(255²/(σ² + 1/12))."""
    sigma = 12.0
    for picture in testset:
        grey = picture.luminance.astype(float)
        sign = np.where(np.indices(grey.shape).sum(axis=0) % 2, 1, -1)
        write(tmp_path / "offset" / f"{picture.name}.tif_ratio_0.1.png", (grey + 7).astype(np.uint8))
        write(tmp_path / "checker" / f"{picture.name.upper()}_rec.bmp", (grey + 25 * sign).astype(np.uint8))
        noisy = (grey + RNG.normal(0, sigma, grey.shape)).round().clip(0, 255)
        write(tmp_path / "noise" / f"IDM-{picture.name}.png", noisy.astype(np.uint8))
    for name, psnr in (("offset", 20 * math.log10(255 / 7)), ("checker", 20 * math.log10(255 / 25))):
        method = score_method(name, tmp_path / name, testset)
        assert [score.psnr for score in method.scores.values()] == pytest.approx([psnr] * 4, abs=1e-12)
        assert method.average() == (pytest.approx(psnr), method.average().ssim, 4)
        assert method.remarks == []
    pixels = sum(picture.luminance.size for picture in testset)
    noise = score_method("noise", tmp_path / "noise", testset)
    error = sum(255**2 * 10 ** (-noise.scores[picture.name].psnr / 10) * picture.luminance.size
                for picture in testset) / pixels
    assert error == pytest.approx(sigma**2 + 1 / 12, rel=4 * math.sqrt(2 / pixels))  # four standard deviations


def test_closed_form_of_ssim(tmp_path):
    """Of two flat pictures a and b it is (2ab + C₁) / (a² + b² + C₁), C₁ = (0.01 · 255)²."""
    a, b, c1 = 100, 140, 2.55**2
    write(tmp_path / "m" / "flat_x.png", np.full((30, 30), b, np.uint8))
    method = score_method("m", tmp_path / "m", [Picture("flat", np.full((30, 30), a, np.uint8))])
    assert method.scores["flat"].ssim == pytest.approx((2 * a * b + c1) / (a**2 + b**2 + c1), abs=1e-12)


def test_colour_is_scored_on_the_y_of_opencv(tmp_path, testset):
    """Colour and grey, 8 and 16 bits, with alpha and without, against OpenCV and scikit-image."""
    (picture,) = [picture for picture in testset if picture.name == "colour"]
    original = cv2.imread(str(tmp_path / "data" / "set" / "colour.png"))
    degraded = cv2.GaussianBlur(original, (0, 0), 1.2)
    y, truth = (cv2.cvtColor(pixels, cv2.COLOR_BGR2YCrCb)[..., 0] for pixels in (degraded, original))
    alpha = np.dstack([degraded, RNG.integers(0, 256, degraded.shape[:2], dtype=np.uint8)])
    for name, pixels in (("colour", degraded), ("grey", y), ("deep", degraded.astype(np.uint16) * 257),
                         ("alpha", alpha)):
        write(tmp_path / name / "colour.png", pixels)
        score = score_method(name, tmp_path / name, [picture]).scores["colour"]
        assert score.psnr == pytest.approx(cv2.PSNR(truth, y), abs=1e-9)
        assert score.ssim == pytest.approx(structural_similarity(truth, y, data_range=255), abs=1e-9)


def test_values_from_16_to_235_are_told_and_other_faults_are_not_taken_for_them(tmp_path):
    truth = cv2.GaussianBlur(RNG.integers(0, 256, (64, 64), dtype=np.uint8), (0, 0), 2).astype(float)
    truth = 255 * (truth - truth.min()) / (truth.max() - truth.min())
    picture = Picture("a", truth.round().astype(np.uint8))
    noisy, worse = (truth + RNG.normal(0, sigma, truth.shape) for sigma in (5, 25))
    for name, pixels in (("limited", 16 + noisy * 219 / 255), ("noise", noisy), ("blur", cv2.blur(truth, (9, 9))),
                         ("limited, of little quality", 16 + worse * 219 / 255), ("much noise", worse),
                         ("bright", truth + 16), ("flat", np.full(truth.shape, truth.mean()))):
        write(tmp_path / name / "a.png", pixels.round().clip(0, 255).astype(np.uint8))
        told = [remark for remark in score_method(name, tmp_path / name, [picture]).remarks if remark.kind == "range"]
        assert len(told) == name.startswith("limited")
        assert all("values from 16 to 235 instead of 0 to 255" in remark.text for remark in told)


@pytest.mark.parametrize("level", ["set/10", "set/0.1", "set/0.10", "set", "0.1", "."])
def test_folders_are_found_with_and_without_levels(tmp_path, level):
    write(tmp_path / "m" / level / "a.png", np.zeros((9, 9), np.uint8))
    write(tmp_path / "m" / "set" / "30" / "a.png", np.zeros((9, 9), np.uint8))
    assert find_folder(tmp_path / "m", "set", 0.1) == tmp_path / "m" / level
    for one_set, one_ratio, enough in ((False, True, level.startswith("set")), (True, False, level[-1] in "10"),
                                       (False, False, level.startswith("set/"))):
        if enough:
            assert find_folder(tmp_path / "m", "set", 0.1, one_set, one_ratio) == tmp_path / "m" / level
        else:
            with pytest.raises(UserError, match="holds no picture of set at 10 %"):
                find_folder(tmp_path / "m", "set", 0.1, one_set, one_ratio)


def test_a_perfect_picture_and_one_too_small_for_ssim(tmp_path):
    dot = Picture("dot", np.array([[200]], np.uint8))
    write(tmp_path / "m" / "dot.png", dot.luminance)
    method = score_method("m", tmp_path / "m", [dot])
    assert method.scores["dot"].psnr == math.inf
    assert math.isnan(method.scores["dot"].ssim)


def test_what_cannot_be_scored_is_told(tmp_path, testset):
    folder = tmp_path / "m"
    picture = {picture.name: picture.luminance for picture in testset}
    write(folder / "img_10.png", picture["img_10"])
    write(folder / "img_1.png", picture["img_1"].T)
    write(folder / "barbara.png", picture["Barbara"])
    write(folder / "barbara_gt.png", picture["Barbara"])
    write(folder / "lighthouse.png", picture["Barbara"])
    write(folder / "img_10_and_colour.png", picture["Barbara"])
    write(folder / "colour.bmp", picture["colour"])
    (folder / "colour.bmp").write_bytes((folder / "colour.bmp").read_bytes()[:900])
    (folder / "notes.txt").write_text("not a picture, nor meant to be one")
    method = score_method("m", folder, testset)
    assert list(method.scores) == ["img_10"]
    told = {(remark.kind, remark.picture, remark.file) for remark in method.remarks}
    assert told == {("wrong size", "img_1", "img_1.png"), ("ambiguous", "Barbara", "barbara.png | barbara_gt.png"),
                    ("extra", "", "lighthouse.png"), ("unreadable", "colour", "colour.bmp"),
                    ("ambiguous", "colour | img_10", "img_10_and_colour.png")}
    (text,) = [remark.text for remark in method.remarks if remark.kind == "wrong size"]
    assert "64x48 instead of 48x64" in text
    (folder / "img_1.png").unlink()
    assert ("missing", "img_1") in [remark[::2] for remark in score_method("m", folder, testset).remarks]


@pytest.mark.parametrize("claim, told", [("PSNR_31.13", 0), ("PSNR_31.32", 0), ("PSNR_31.34", 1), ("PSNR_nan", 1),
                                         ("PSNR_31.10_SSIM_0.5", 2), ("PSNR_inf", 1), ("ratio_0.1", 0)])
def test_a_claim_off_by_more_than_a_tenth_of_a_decibel_is_told(tmp_path, claim, told):
    """An offset of 7 has 31.2285 dB."""
    picture = Picture("img_1", RNG.integers(60, 190, (40, 40), dtype=np.uint8))
    write(tmp_path / "m" / f"img_1_{claim}.png", picture.luminance + 7)
    claims = score_method("m", tmp_path / "m", [picture]).remarks
    assert [claim.kind for claim in claims] == ["claim"] * told
    if told:
        assert "scores 31.23 dB" in claims[0].text
        assert "rounding" not in claims[0].text  # worth 0.007 dB


@pytest.mark.parametrize("claim, explained", [("48.50", True), ("49.20", False), ("47.90", False)])
def test_a_claim_that_rounding_explains_is_told_as_such(tmp_path, claim, explained):
    """An offset of 1 has 48.13 dB; 1/12 more or less of squared error is 0.35 dB there."""
    picture = Picture("img_1", RNG.integers(60, 190, (40, 40), dtype=np.uint8))
    write(tmp_path / "m" / f"img_1_PSNR_{claim}.png", picture.luminance + 1)
    (remark,) = score_method("m", tmp_path / "m", [picture]).remarks
    assert remark.text.endswith("scores 48.13 dB, as rounding to 8 bits may explain") == explained


def test_averages_over_the_pictures_that_all_methods_have(tmp_path, testset):
    """a has offsets 5 and 10, 34.15 and 28.13 dB; b has but two pictures, with offset 10."""
    for picture in testset:
        offset = 5 if picture.name in ("img_1", "img_10") else 10
        write(tmp_path / "a" / f"{picture.name}.png", picture.luminance + offset)
        if picture.name in ("img_10", "colour"):
            write(tmp_path / "b" / f"{picture.name}.png", picture.luminance + 10)
    a, b = (score_method(name, tmp_path / name, testset) for name in "ab")
    comparison = Comparison("set", 0.1, [picture.name for picture in testset], [a, b])
    five, ten = (20 * math.log10(255 / d) for d in (5, 10))
    assert comparison.common == ["colour", "img_10"]
    assert not comparison.alike
    assert a.average()[::2] == (pytest.approx((five + five + ten + ten) / 4), 4)
    assert a.average(comparison.common)[::2] == (pytest.approx((five + ten) / 2), 2)
    assert b.average()[::2] == b.average(comparison.common)[::2] == (pytest.approx(ten), 2)


def test_scores_csv_is_met_exactly_where_nothing_is_rounded(tmp_path, testset):
    """Reconstructions of whole levels, recorded by scikit-image as test.py would, written by test.py's own function."""
    folder = tmp_path / "result" / "set" / "10"
    folder.mkdir(parents=True)
    with open(folder / "scores.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(("name", "psnr", "ssim", "seconds"))
        for picture in testset:
            x_hat = picture.luminance + RNG.integers(-9, 9, picture.luminance.shape).astype(np.float32)
            write_reconstruction(folder / f"{picture.name}_PSNR_34.00.png", x_hat)
            rows.writerow((picture.name, peak_signal_noise_ratio(picture.luminance, x_hat, data_range=255),
                           structural_similarity(picture.luminance.astype(float), x_hat.astype(float), data_range=255),
                           0.5))
    assert find_folder(tmp_path / "result", "set", 0.1) == folder
    method = score_method("own", folder, testset)
    assert len(method.recorded) == 4
    for name, recorded in method.recorded.items():
        assert method.scores[name][1:3] == pytest.approx(recorded, abs=1e-9)


def test_rounding_costs_what_it_is_said_to(tmp_path):
    """A float reconstruction with error of deviation 1 (48 dB), before and after it is written."""
    truth = RNG.integers(60, 190, (400, 400), dtype=np.uint8)
    x_hat = truth + RNG.normal(0, 1, truth.shape)
    before = peak_signal_noise_ratio(truth, x_hat, data_range=255)
    write_reconstruction(tmp_path / "a.png", x_hat)
    after = cv2.PSNR(truth, cv2.imread(str(tmp_path / "a.png"), cv2.IMREAD_GRAYSCALE))
    assert before - after == pytest.approx(rounding_effect(before), rel=0.05)
    assert rounding_effect(30) == pytest.approx(0.0056, abs=5e-5)
    assert rounding_effect(40) == pytest.approx(0.0553, abs=5e-5)
    assert rounding_effect(3278) == math.inf


def test_what_no_picture_can_score_is_but_a_wrong_claim(tmp_path, testset):
    name = testset[1].name
    write(tmp_path / "m" / f"{name}_PSNR_3278.png", testset[1].luminance + np.uint8(1))
    (remark,) = [remark for remark in score_method("m", tmp_path / "m", testset).remarks if remark.kind == "claim"]
    assert remark.text.startswith(f"{name} claims 3278.00 dB, scores ")


@pytest.mark.parametrize("content", ["", "name,psnr\na,b\n", "method,psnr,ssim\nx,1,2\n", "name,psnr,ssim\nimg_1,x,1\n",
                                     "\0\xff", "name,psnr,ssim\nother,1,1\n", "name,psnr,ssim\nimg_1\n"])
def test_somebody_elses_scores_csv_is_let_be(tmp_path, testset, content):
    write(tmp_path / "m" / "img_1.png", testset[1].luminance)
    (tmp_path / "m" / "scores.csv").write_text(content, encoding="latin-1")
    assert score_method("m", tmp_path / "m", testset).recorded == {}


def test_folders_without_a_picture_of_the_set_are_refused(tmp_path, testset):
    write(tmp_path / "other" / "lighthouse.png", testset[1].luminance)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no file in .*other is named after .*lighthouse.png"):
        score_method("m", tmp_path / "other", testset)
    with pytest.raises(UserError, match="empty holds no picture"):
        find_folder(tmp_path / "empty", "set", 0.1)
    with pytest.raises(UserError, match="there is no folder .*nowhere"):
        find_folder(tmp_path / "nowhere", "set", 0.1)


def test_a_folder_that_cannot_be_searched_is_refused_in_a_sentence(tmp_path, monkeypatch):
    (tmp_path / "locked").mkdir()
    stat = os.stat

    def refusing(path, *args, **kwargs):
        if f"locked{os.sep}" in str(path):
            raise PermissionError(errno.EACCES, "Permission denied")
        return stat(path, *args, **kwargs)

    monkeypatch.setattr(os, "stat", refusing)
    with pytest.raises(UserError, match="cannot search .*locked: Permission denied"):
        find_folder(tmp_path / "locked", "set", 0.1)


def test_gaps_of_what_is_not_finite():
    assert gap(math.inf, math.inf) == gap(math.nan, math.nan) == 0
    assert gap(math.inf, 3) == gap(math.nan, 3) == gap(3, math.nan) == math.inf
