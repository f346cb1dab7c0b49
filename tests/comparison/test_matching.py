"""File names as the field publishes them, and names that look alike."""
import unicodedata

import pytest

from utils.comparison.matching import claimed_psnr, claimed_ssim, match, read_aliases
from utils.data.images import file_stem
from utils.errors import UserError


@pytest.mark.parametrize("file", [
    "Barbara.png", "barbara.TIF", "BARBARA.bmp", "barbara_rec.png", "Barbara.tif_ratio_0.1_PSNR_32.78_SSIM_0.9379.png",
    "barbara_PSNR_32.78_SSIM_0.9379.png", "barbara_PSNR_inf_SSIM_1.0000.png", "IDM_Barbara_T3.png", "barbara (1).png",
    "barbara_psnr32.78dB_ssim0.93.png", "barbara_PSNR_32,78 dB.png", "barbara_SSIM_-0.0812.png",
    "barbara.tif.png", "Set11-barbara-cs_ratio=0.25.jpg", "barbara_IDM_ratio_10_epoch_100_PSNR_32.780_SSIM_0.93790.png",
])
def test_published_names_show_their_picture(file):
    found = match(["Monarch", "barbara", "house", "10", "1"], [file])
    assert found.files == {"barbara": file}
    assert found.missing == ["Monarch", "house", "10", "1"]
    assert not (found.extra or found.rivals or found.unclear)


@pytest.mark.parametrize("pictures, files", [
    (["img_1", "img_10", "img_100"], ["img_1_rec.png", "img_10_rec.png", "img_100_rec.png"]),
    (["house", "lighthouse", "greenhouse"], ["house.png", "lighthouse.png", "greenhouse.png"]),
    (["test", "test_1", "test_1_b"], ["test_rec.png", "test_1_rec.png", "test_1_b_rec.png"]),
    (["1", "2", "10"], ["1_IDM_10.png", "2_IDM_10.png", "10_IDM_10.png"]),
    (["3", "30"], ["3_PSNR_30.00.png", "30_PSNR_3.00.png"]),
    (["0801", "0812"], ["0801_SSIM_0.0812.png", "DIV2K_0812.png"]),
    (["A", "a"], ["A.png", "a.png"]),
    (["twin.png", "twin.bmp"], ["twin.png_PSNR_30.00_SSIM_0.9000.png", "TWIN.bmp"]),
    (["a-b", "a_b"], ["a-b_PSNR_30.00.png", "a_b.tif"]),
    (["---", "+"], ["---_PSNR_30.00_SSIM_0.9000.png", "+.png"]),
    (["größe"], [unicodedata.normalize("NFD", "größe_rec.png")]),
    (["aspect_ratio_1", "aspect_ratio_2"], ["aspect_ratio_2.png", "aspect_ratio_1.png"][::-1]),
    (["test_01", "test_10", "lena256"], ["test001.png", "test010_PSNR_30.00.png", "Lena_256.png"]),
    (["test_01", "test_1"], ["test_01_x.png", "test_1_x.png"]),
])
def test_names_that_look_alike_are_told_apart(pictures, files):
    """File k shows picture k, in whatever order the files come."""
    for order in (files, files[::-1]):
        found = match(pictures, order)
        assert found.files == dict(zip(pictures, files, strict=True))
        assert not (found.missing or found.extra or found.rivals or found.unclear)


@pytest.mark.parametrize("picture", ["a", "a_PSNR_30.00_SSIM_0.9000", "a_PSNR_30.00", "psnr 3", "ratio_0.1", "x" * 255])
def test_what_test_py_writes_of_a_picture_is_matched_whatever_the_picture_is_called(picture):
    file = f"{file_stem(picture)}_PSNR_28.00_SSIM_0.8000.png"
    assert match([picture, "b_PSNR_30.00"], [file]).files == {picture: file}
    assert (claimed_psnr(file), claimed_ssim(file)) == (28, 0.8)


def test_other_names_of_pictures(tmp_path):
    (tmp_path / "map.csv").write_text("\ufefflena, lena256\n1,barbara\n\n2,boats\n", encoding="utf-8")
    aliases = read_aliases(tmp_path / "map.csv", {"lena256", "barbara", "boats"})
    assert aliases == {"lena": "lena256", "1": "barbara", "2": "boats"}
    files = ["Lena_rec.png", "1_IDM_2.png", "2_PSNR_1.00.png"]
    assert match(["barbara", "boats", "lena256"], files, aliases).files == {
        "lena256": files[0], "barbara": files[1], "boats": files[2]}
    assert match(["barbara", "boats", "lena256"], files).extra == files
    for line in ("lena", "lena,", "x,lenna", "a,b,c"):
        (tmp_path / "map.csv").write_text(f"lena,lena256\n{line}\n")
        with pytest.raises(UserError, match="line 2 of .*map.csv is "):
            read_aliases(tmp_path / "map.csv", {"lena256"})


@pytest.mark.parametrize("file", ["img_1.png", "img_11.png", "lighthouse.png", "houses.png", "house2.png", "10.png",
                                  "PSNR_30.00.png", ".png"])
def test_what_shows_no_picture_of_the_set_is_extra(file):
    found = match(["img_10", "house", "30"], [file])
    assert found.extra == [file]
    assert found.missing == ["img_10", "house", "30"]
    assert not (found.files or found.rivals or found.unclear)


def test_no_guess_is_made():
    found = match(["boats", "house", "barbara", "Monarch"],
                  ["house.png", "house_gt.png", "boats_and_barbara.png", "Monarch.png"])
    assert found.files == {"Monarch": "Monarch.png"}
    assert found.rivals == {"house": ["house.png", "house_gt.png"]}
    assert found.unclear == {"boats_and_barbara.png": ["boats", "barbara"]}
    assert found.missing == found.extra == []  # neither is missing for certain
    assert match(["boats", "house"], ["boats.png", "boats_house.png"]).files == {"boats": "boats.png"}
    assert set(match(["A", "a"], ["A_rec.png"]).unclear) == {"A_rec.png"}  # case alone differs


@pytest.mark.parametrize("file, psnr, ssim", [
    ("Barbara.tif_ratio_0.1_PSNR_32.78_SSIM_0.9379.png", 32.78, 0.9379),
    ("a_PSNR_32.png", 32, None), ("a_psnr=28.5.png", 28.5, None), ("a-PSNR-28.50-SSIM-0.9.png", 28.5, 0.9),
    ("psnr30.1ssim0.5.png", 30.1, 0.5), ("a_PSNR_inf_SSIM_1.0000.png", float("inf"), 1),
    ("a_psnr32.78dB_ssim0.93.png", 32.78, 0.93), ("a_PSNR_32,78dB", 32.78, None), ("a_PSNR_30dBssim.9.png", 30, None),
    ("a_SSIM_-0.7047.png", None, -0.7047), ("a ssim=-0.1", None, -0.1), ("a SSIM - 0.1", None, 0.1),
    ("a_noise_20dB.png", None, None), ("a_PSNR_info.png", None, None), ("30.12.png", None, None),
])
def test_claims_are_read(file, psnr, ssim):
    assert claimed_psnr(file) == psnr
    assert claimed_ssim(file) == ssim
