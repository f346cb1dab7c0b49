"""Training crops are true windows of the pictures, and the same whoever draws them."""
import binascii
import os

import cv2
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from utils.data.crops import TrainingCrops
from utils.errors import UserError


def coded(height: int, width: int, picture: int) -> np.ndarray:
    """A grey picture whose every pixel tells the picture, and together with its neighbours the place."""
    row, column = np.mgrid[:height, :width]
    return ((7 * row + 3 * column * column + 50 * picture) % 256).astype(np.uint8)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "deep" / "er").mkdir(parents=True)
    for number, name in enumerate(["a.png", "deep/b.bmp", "deep/er/c.TIFF"]):
        assert cv2.imwrite(str(tmp_path / name), coded(40 + number, 50 - number, number))
    cv2.imwrite(str(tmp_path / "narrow.png"), coded(100, 15, 9))
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    (tmp_path / "notes.txt").write_text("not a picture either")
    return tmp_path


@pytest.fixture(params=["in memory", "cached"])
def cache_dir(request, tmp_path_factory):
    """Where the pictures are kept: every test with it holds for both."""
    return tmp_path_factory.mktemp("cache") if request.param == "cached" else None


def test_every_crop_is_a_window_of_one_picture(folder, cache_dir):
    crops = TrainingCrops(folder, 16, seed=3, cache_dir=cache_dir)
    sources = [coded(40 + number, 50 - number, number) for number in range(3)]
    windows = [np.lib.stride_tricks.sliding_window_view(source, (16, 16)) for source in sources]
    found = set()
    for index in range(60):
        crop = crops[index]
        assert crop.shape == (1, 16, 16) and crop.dtype == torch.uint8
        places = [(number, top, left) for number, view in enumerate(windows)
                  for top, left in np.argwhere((view == crop[0].numpy()).all((2, 3)))]
        assert places, f"crop {index} is nowhere in the pictures"
        found.add(tuple(map(int, places[0])))
    assert {place[0] for place in found} == {0, 1, 2}
    assert len(found) > 50


def test_a_crop_depends_on_seed_and_number_alone(folder, cache_dir):
    crops = TrainingCrops(folder, 16, seed=3, cache_dir=cache_dir)
    whole = torch.cat(list(DataLoader(crops, 4, sampler=range(24))))
    later = torch.cat(list(DataLoader(crops, 4, sampler=range(12, 24), num_workers=2)))
    assert torch.equal(whole[12:], later)
    other = TrainingCrops(folder, 16, seed=4)
    assert not torch.equal(whole, torch.stack([other[index] for index in range(24)]))


def test_crops_are_the_same_cached_or_not_for_every_patch_size(folder, tmp_path_factory):
    cache_dir = tmp_path_factory.mktemp("cache")
    for patch_size in (16, 1, 40, 41, 3):
        loaded, cached = (TrainingCrops(folder, patch_size, 5, where) for where in (None, cache_dir))
        assert all(torch.equal(loaded[index], cached[index]) for index in range(50))
        assert loaded.fingerprint() == cached.fingerprint() and loaded.notice == cached.notice
        assert loaded.names == cached.names
    assert len(list(cache_dir.glob("*.luminance"))) == 1


def test_fingerprint_is_the_one_that_states_of_earlier_runs_hold(folder, cache_dir):
    """CRC-32 of a line a picture, name and size, computed with binascii."""
    lines = b"a.png (40, 50)\ndeep/b.bmp (41, 49)\ndeep/er/c.TIFF (42, 48)"
    expected = f"3 (names and sizes {binascii.crc32(lines):08x})"
    assert TrainingCrops(folder, 16, cache_dir=cache_dir).fingerprint() == expected


def test_small_pictures_are_counted_and_unreadable_ones_named(folder, cache_dir):
    crops = TrainingCrops(folder, 16, cache_dir=cache_dir)
    assert crops.names == ["a.png", "deep/b.bmp", "deep/er/c.TIFF"]
    assert crops.notice == "left out of 5 pictures: 1 that cannot be read (broken.jpg) and 1 smaller than 16x16"
    assert TrainingCrops(folder / "deep", 16, cache_dir=cache_dir).notice == ""


def test_of_many_unreadable_pictures_ten_are_named(folder, cache_dir):
    for number in range(12):
        (folder / f"u{number:02}.png").write_bytes(b"")
    (folder / os.fsdecode(b"bell\x07\n\xff.png")).write_bytes(b"")
    assert TrainingCrops(folder, 1, cache_dir=cache_dir).notice == (
        "left out of 18 pictures: 14 that cannot be read ('bell\\x07\\n\\udcff.png', broken.jpg, u00.png, u01.png, "
        "u02.png, u03.png, u04.png, u05.png, u06.png, u07.png and 4 more)")


def test_nothing_of_use_is_the_users_mistake(folder, cache_dir):
    with pytest.raises(UserError, match=r"none of the 5 pictures .* 1 that cannot be read \(broken.jpg\) and 4"):
        TrainingCrops(folder, 64, cache_dir=cache_dir)
    for path in folder.rglob("*.*"):
        if path.is_file():
            path.write_bytes(b"")
    with pytest.raises(UserError, match=r"none of the 5 pictures .* 5 that cannot be read \(a.png, broken"):
        TrainingCrops(folder, 1, cache_dir=cache_dir)


def test_a_missing_or_empty_folder_is_the_users_mistake(tmp_path, cache_dir):
    with pytest.raises(UserError, match="there is no folder .*nowhere"):
        TrainingCrops(tmp_path / "nowhere", 16, cache_dir=cache_dir)
    with pytest.raises(UserError, match="no picture"):
        TrainingCrops(tmp_path, 16, cache_dir=cache_dir)


def test_fingerprint_tells_other_pictures(folder, cache_dir):
    before = TrainingCrops(folder, 16, cache_dir=cache_dir).fingerprint()
    assert TrainingCrops(folder, 16, seed=9, cache_dir=cache_dir).fingerprint() == before
    cv2.imwrite(str(folder / "more.png"), coded(40, 40, 5))
    assert TrainingCrops(folder, 16, cache_dir=cache_dir).fingerprint() != before
