"""Pictures of every kind in, reconstructions out. Expected numbers come from Pillow and from closed forms."""
import os
import struct
import sys
import zlib

import cv2
import numpy as np
import pytest
import skimage.data
import tifffile
import torch
from PIL import Image

from utils.data.images import (
    find_pictures,
    list_pictures,
    pad_to_multiple,
    read_picture,
    remove_former,
    write_reconstruction,
)
from utils.errors import UserError


@pytest.fixture
def colours() -> np.ndarray:
    """A smooth RGB picture of odd size, (37, 23, 3)."""
    y, x = np.mgrid[0:37, 0:23]
    return np.dstack([5 * y + 30, 8 * x + 20, 3 * (x + y) + 10]).astype(np.uint8)


def bt601(rgb: np.ndarray) -> np.ndarray:
    return rgb @ np.array([0.299, 0.587, 0.114])


@pytest.mark.parametrize("suffix", [".png", ".tif", ".tiff", ".bmp", ".PNG"])
def test_luminance_and_colour_differences_follow_bt601(tmp_path, colours, suffix):
    path = tmp_path / f"ü {suffix}"
    Image.fromarray(colours).save(path)
    luminance, ycrcb = read_picture(path)
    exact = bt601(colours.astype(float))
    assert luminance.dtype == ycrcb.dtype == np.uint8
    assert np.abs(luminance - exact).max() <= 0.51
    assert np.abs(ycrcb[..., 1] - (0.713 * (colours[..., 0] - exact) + 128)).max() <= 1
    assert np.abs(ycrcb[..., 2] - (0.564 * (colours[..., 2] - exact) + 128)).max() <= 1
    assert (ycrcb[..., 0] == luminance).all()


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_alpha_is_dropped(tmp_path, colours, mode):
    opaque = Image.fromarray(colours).convert(mode)
    opaque.putalpha(Image.fromarray(colours[..., 0]))
    opaque.save(tmp_path / "a.png")
    expected = np.asarray(Image.fromarray(colours).convert("RGB" if mode == "RGBA" else "L").convert("RGB"))
    assert np.abs(read_picture(tmp_path / "a.png")[0] - bt601(expected.astype(float))).max() <= 0.51


def test_a_transparent_tiff_which_opencv_darkens_is_refused(tmp_path, colours):
    picture = Image.fromarray(colours)
    picture.putalpha(255)
    picture.save(tmp_path / "a.tif")
    assert np.abs(read_picture(tmp_path / "a.tif")[0] - bt601(colours.astype(float))).max() <= 0.51
    picture.putalpha(128)
    picture.save(tmp_path / "a.tif")
    with pytest.raises(UserError, match="a.tif: OpenCV would darken it.*without alpha"):
        read_picture(tmp_path / "a.tif")


def test_grey_pictures_have_no_colour(tmp_path, colours):
    Image.fromarray(colours[..., 0]).save(tmp_path / "a.png")
    luminance, ycrcb = read_picture(tmp_path / "a.png")
    assert ycrcb is None
    assert (luminance == colours[..., 0]).all()


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_sixteen_bits_are_rounded_to_eight(tmp_path, suffix):
    values = np.array([[0, 128, 129, 257, 385, 386, 32768, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / f"a{suffix}")
    assert read_picture(tmp_path / f"a{suffix}")[0].tolist() == [[0, 0, 1, 1, 1, 2, 128, 255]]  # v / 257, rounded


def test_sixteen_bit_colour_reads_as_the_eight_bit_picture_does(tmp_path, colours):
    cv2.imwrite(str(tmp_path / "8.png"), colours)
    cv2.imwrite(str(tmp_path / "16.png"), colours.astype(np.uint16) * 257)
    assert (read_picture(tmp_path / "16.png")[1] == read_picture(tmp_path / "8.png")[1]).all()


def test_one_bit_palette_and_single_pixel_pictures(tmp_path):
    Image.fromarray(np.array([[200]], np.uint8)).save(tmp_path / "1x1.png")
    assert read_picture(tmp_path / "1x1.png")[0].tolist() == [[200]]
    Image.fromarray(np.array([[0, 255, 0]], np.uint8)).convert("1").save(tmp_path / "bits.png")
    assert read_picture(tmp_path / "bits.png")[0].tolist() == [[0, 255, 0]]
    Image.fromarray(np.array([[7, 90, 7]], np.uint8)).convert("P").save(tmp_path / "palette.png")
    assert read_picture(tmp_path / "palette.png")[0].tolist() == [[7, 90, 7]]


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".bmp", ".tif"])
@pytest.mark.parametrize("part", [0, 0.5, 0.97])
def test_a_truncated_file_is_refused_by_name(tmp_path, capfd, colours, suffix, part):
    path = tmp_path / f"cut{suffix}"
    Image.fromarray(colours).resize((200, 150)).save(path)
    path.write_bytes(path.read_bytes()[:int(path.stat().st_size * part)])
    with pytest.raises(UserError, match=f"cut{suffix}"):
        read_picture(path)
    assert capfd.readouterr().err == ""  # nothing of OpenCV's beside the message


def photograph() -> Image.Image:
    return Image.fromarray(skimage.data.chelsea()[:200, :300])


@pytest.mark.parametrize("damage", ["a bit flipped", "a run of zeros"])
def test_a_deflate_tiff_with_any_bit_flipped_is_refused(tmp_path, damage):
    photograph().save(tmp_path / "a.tif", compression="tiff_adobe_deflate")
    intact, rng = (tmp_path / "a.tif").read_bytes(), np.random.default_rng(0)
    read_picture(tmp_path / "a.tif")
    for at in rng.integers(500, len(intact) - 500, 40):
        damaged = bytearray(intact)
        damaged[at:at + 100] = bytes(100)
        if damage == "a bit flipped":
            damaged = intact[:at] + bytes([intact[at] ^ 1]) + intact[at + 1:]
        (tmp_path / "a.tif").write_bytes(damaged)
        with pytest.raises(UserError, match="a.tif: it is damaged"):
            read_picture(tmp_path / "a.tif")


@pytest.mark.parametrize("predictor, found", [(1, 18), (2, 18)])
def test_an_lzw_tiff_is_refused_where_its_strips_have_another_length(tmp_path, predictor, found):
    """At least three of ten flipped bits; LZW has no checksum, so the others cannot be told from other pixels."""
    photograph().save(tmp_path / "a.tif", compression="tiff_lzw", tiffinfo={317: predictor})
    intact, rng = (tmp_path / "a.tif").read_bytes(), np.random.default_rng(0)
    read_picture(tmp_path / "a.tif")
    refused = 0
    for at in rng.integers(500, len(intact) - 500, 60):
        (tmp_path / "a.tif").write_bytes(intact[:at] + bytes([intact[at] ^ 1 << rng.integers(8)]) + intact[at + 1:])
        try:
            read_picture(tmp_path / "a.tif")
        except UserError as error:
            assert "a.tif: it is damaged" in str(error)
            refused += 1
    assert refused >= found


@pytest.mark.parametrize("rows", [1, 7, 1000])
@pytest.mark.parametrize("predictor", [1, 2])
@pytest.mark.parametrize("depth", [8, 16])
def test_intact_lzw_tiffs_are_read(tmp_path, rows, predictor, depth):
    pictures = {"colour": skimage.data.chelsea(), "grey": skimage.data.camera(), "1x1": np.full((1, 1), 200, np.uint8),
                "white": np.full((700, 900), 255, np.uint8), "even": np.full((90, 31), 70, np.uint8),
                "noise": np.random.default_rng(0).integers(20, 256, (301, 299, 3), dtype=np.uint8)}
    for name, pixels in pictures.items():
        cv2.imwrite(str(tmp_path / "a.tif"), pixels if depth == 8 else pixels.astype(np.uint16) * 257,
                    [cv2.IMWRITE_TIFF_COMPRESSION, 5, cv2.IMWRITE_TIFF_ROWSPERSTRIP, rows,
                     cv2.IMWRITE_TIFF_PREDICTOR, predictor])
        expected = cv2.cvtColor(pixels, cv2.COLOR_BGR2YCrCb)[..., 0] if pixels.ndim == 3 else pixels
        assert (read_picture(tmp_path / "a.tif")[0] == expected).all(), name
    Image.fromarray(pictures["colour"]).convert("1").save(tmp_path / "a.tif", compression="tiff_lzw")
    assert set(np.unique(read_picture(tmp_path / "a.tif")[0])) == {0, 255}


@pytest.mark.parametrize("name, options, kept", [("a.tif", {"compression": "tiff_lzw"}, bytes(300)),
                                                 ("b.tif", {"compression": "jpeg", "quality": 90}, bytes(300)),
                                                 ("a.jpg", {"quality": 90}, b""),
                                                 ("a.jpeg", {"quality": 90, "progressive": True}, b"")])
def test_what_a_decoder_only_warns_of_is_refused(tmp_path, name, options, kept):
    """Files that have neither a checksum nor a wrong end; in their middle, bytes are zeros or missing."""
    photograph().save(tmp_path / name, **options)
    intact = (tmp_path / name).read_bytes()
    read_picture(tmp_path / name)
    for at in range(6000, 16000, 2500):
        (tmp_path / name).write_bytes(intact[:at] + kept + intact[at + 300:])
        with pytest.raises(UserError, match=f"{name}: it is damaged"):
            read_picture(tmp_path / name)


@pytest.mark.parametrize("big", [False, True])
def test_16_bit_tiffs_whose_zero_is_white_and_transparent_ones(tmp_path, big):
    values = np.linspace(0, 65535, 48, dtype=np.uint16).reshape(6, 8)
    for photometric, expected in (("miniswhite", 65535 - values), ("minisblack", values)):
        for depth in (16, 8):
            stored = values if depth == 16 else (values >> 8).astype(np.uint8)
            tifffile.imwrite(tmp_path / "a.tif", stored, photometric=photometric, bigtiff=big)
            error = np.abs(read_picture(tmp_path / "a.tif")[0] - expected / 257)
            assert error.max() <= (0.5 if depth == 16 else 1)
    rgba = np.full((6, 8, 4), 128, np.uint8)
    tifffile.imwrite(tmp_path / "a.tif", rgba, photometric="rgb", extrasamples=["unassalpha"], bigtiff=big)
    with pytest.raises(UserError, match="OpenCV would darken it"):
        read_picture(tmp_path / "a.tif")


@pytest.mark.parametrize("stored, options", [
    (np.zeros((6, 8), np.uint16), {"photometric": "miniswhite", "byteorder": ">"}),
    (np.zeros((6, 8, 4), np.uint8), {"photometric": "rgb", "byteorder": ">", "bigtiff": True, "extrasamples": [2]}),
    (np.zeros((3, 6, 8), np.uint16), {"photometric": "rgb", "planarconfig": "separate"}),
    (np.zeros((6, 8, 3), np.uint8), {"photometric": "cielab"})])
def test_tiffs_that_opencv_misreads_are_refused(tmp_path, stored, options):
    tifffile.imwrite(tmp_path / "a.tif", stored, **options)
    with pytest.raises(UserError, match="a.tif: .*save it as PNG"):
        read_picture(tmp_path / "a.tif")


@pytest.mark.parametrize("most", [255, 1023, 4095])
def test_few_bits_in_16_are_not_taken_for_black(tmp_path, most):
    values = np.linspace(0, most, 48, dtype=np.uint16).reshape(6, 8)
    cv2.imwrite(str(tmp_path / "a.png"), values)
    with pytest.raises(UserError, match=f"16-bit samples reach only {most}; scale them to 65535, or save it with 8"):
        read_picture(tmp_path / "a.png")
    (tmp_path / "a.pgm").write_bytes(b"P5\n# by a camera\n8 6\n%d\n" % (most - 1) + values.astype(">u2").tobytes())
    with pytest.raises(UserError, match=f"its white is {most - 1}, not 255 or 65535"):
        read_picture(tmp_path / "a.pgm")


def test_formats_beyond_the_usual_are_neither_passed_over_nor_misread(tmp_path):
    expected = bt601(np.asarray(photograph(), float))
    for name, options, most in (("a.webp", {"lossless": True}, 0.51), ("b.jp2", {}, 0.51), ("c.ppm", {}, 0.51),
                                ("d.pgm", {}, 1), ("e.jfif", {"quality": 95}, 40)):
        (photograph().convert("L") if name == "d.pgm" else photograph()).save(tmp_path / name, **options)
        assert np.abs(read_picture(tmp_path / name)[0] - expected).max() <= most
    assert len(list_pictures(tmp_path)) == 5


def test_an_enormous_picture_is_refused_by_its_header(tmp_path, monkeypatch):
    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    monkeypatch.setattr("cv2.imdecode", lambda *_: pytest.fail("it was decoded"))
    for side in (8193, 10000, 30000):
        header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
        (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
                                         + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b""))
        with pytest.raises(UserError, match="a.png: it has more than 67,108,864 pixels"):
            read_picture(tmp_path / "a.png")


def test_what_is_no_picture_is_refused_by_name(tmp_path):
    (tmp_path / "text.png").write_text("not a picture")
    (tmp_path / "folder.png").mkdir()
    Image.fromarray(np.ones((4, 4), np.float32)).save(tmp_path / "float.tif")
    for name, why in (("text.png", "not a picture"), ("folder.png", "Is a directory"), ("absent.png", "No such file"),
                      ("float.tif", "float32")):
        with pytest.raises(UserError, match=f"{name}.*{why}"):
            read_picture(tmp_path / name)


def test_pictures_are_listed_by_suffix_and_sorted(tmp_path):
    for name in ("b.PNG", "a.tif", "c.JpEg", "notes.txt", ".hidden.png", "d.mat"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "e.png").mkdir()
    assert [path.name for path in list_pictures(tmp_path)] == ["a.tif", "b.PNG", "c.JpEg"]
    with pytest.raises(UserError, match="nowhere"):
        list_pictures(tmp_path / "nowhere")


def test_linked_folders_are_searched_but_not_in_circles(tmp_path, monkeypatch):
    folder, elsewhere = tmp_path / "pictures", tmp_path / "elsewhere"
    for name in ("pictures/b/deep/c.TIFF", "pictures/a.png", "pictures/a.txt", "elsewhere/z.png", "pictures/.x.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (folder / "link").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(folder)
    (folder / "b" / "up").symlink_to(folder)
    (folder / "gone.png").symlink_to("nowhere")
    found = find_pictures(folder)
    assert list(found) == ["a.png", "b/deep/c.TIFF", "link/z.png"] and found["a.png"][0] == len("pictures/a.png")
    scandir = os.scandir

    def refused(path):
        if os.path.basename(path) == "deep":
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refused)
    with pytest.raises(UserError, match="cannot search .*/b/deep for pictures .Permission denied"):
        find_pictures(folder)


def test_a_name_that_a_terminal_would_obey_is_refused(tmp_path):
    for name in ("café\u202f1.png", "a\x1b[31m.txt"):
        (tmp_path / name).touch()
    assert [path.name for path in list_pictures(tmp_path)] == ["café\u202f1.png"]
    (tmp_path / "a\x1b[31m.png").touch()
    with pytest.raises(UserError, match=r"picture a\\x1b\[31m.png in .* has control characters; rename it"):
        list_pictures(tmp_path)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere file names are Unicode")
def test_a_name_that_is_not_utf_8_is_refused(tmp_path):
    (tmp_path / os.fsdecode(b"notes\xff.txt")).write_bytes(b"")
    assert list_pictures(tmp_path) == []
    (tmp_path / os.fsdecode(b"x\xff.png")).write_bytes(b"")
    with pytest.raises(UserError, match=r"picture x\\xff\.png in .* is not valid UTF-8; rename it"):
        list_pictures(tmp_path)


def test_a_grey_reconstruction_is_rounded_not_truncated(tmp_path):
    write_reconstruction(tmp_path / "ü.png", np.array([[-3.0, 0.4, 0.6, 99.7, 254.6, 300.0, np.nan]]))
    assert np.asarray(Image.open(tmp_path / "ü.png")).tolist() == [[0, 0, 1, 100, 255, 255, 0]]


def test_a_reconstruction_takes_its_colours_from_the_original(tmp_path):
    rng = np.random.default_rng(0)
    original = rng.integers(100, 156, (40, 30, 3), dtype=np.uint8)  # mild colours, that no clipping changes
    cv2.imwrite(str(tmp_path / "a.png"), original)
    luminance, ycrcb = read_picture(tmp_path / "a.png")
    write_reconstruction(tmp_path / "b.png", luminance + 10.3, ycrcb)
    written = read_picture(tmp_path / "b.png")[1].astype(int)
    assert np.abs(written[..., 0] - (luminance.astype(int) + 10)).max() <= 1
    assert np.abs(written[..., 1:] - ycrcb[..., 1:]).max() <= 1
    write_reconstruction(tmp_path / "c.png", luminance, ycrcb)
    assert np.abs(cv2.imread(str(tmp_path / "c.png")).astype(int) - original).max() <= 2


def test_former_results_of_the_same_picture_alone_are_removed(tmp_path):
    former = ["a_PSNR_30.12_SSIM_0.9000.png", "a_PSNR_nan_SSIM_nan.png", "a_PSNR_inf_SSIM_1.0000.png"]
    kept = ["ab_PSNR_30.12_SSIM_0.9000.png", "a.png", "scores.csv",
            "a_PSNR_30.12_SSIM_0.9000_PSNR_28.00_SSIM_0.8000.png"]
    for name in former + kept:
        (tmp_path / name).write_bytes(b"")
    remove_former(tmp_path, {"a"})
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(kept)


@pytest.mark.parametrize("size, padded", [((1, 1), (32, 32)), ((32, 64), (32, 64)), ((33, 63), (64, 64))])
def test_padding_is_zeros_at_the_bottom_and_right(size, padded):
    x = pad_to_multiple(torch.ones(2, 1, *size), 32)
    assert x.shape == (2, 1, *padded)
    assert (x[..., :size[0], :size[1]] == 1).all()
    assert x.sum() == 2 * size[0] * size[1]
