"""Training crops are true windows of the pictures, and the same whoever draws them."""
import cv2
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from utils.datasets import TrainingCrops
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


def test_every_crop_is_a_window_of_one_picture(folder):
    crops = TrainingCrops(folder, 16, seed=3)
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


def test_luminance_is_that_of_the_rec_601_formula(tmp_path):
    colour = np.random.default_rng(0).integers(0, 256, (20, 20, 3), dtype=np.uint8)
    cv2.imwrite(str(tmp_path / "colour.png"), colour)
    blue, green, red = colour.astype(float).transpose(2, 0, 1)
    expected = 0.299 * red + 0.587 * green + 0.114 * blue
    assert np.abs(TrainingCrops(tmp_path, 20)[0][0].numpy() - expected).max() <= 0.51


def test_a_crop_depends_on_seed_rank_and_number_alone(folder):
    crops = TrainingCrops(folder, 16, seed=3)
    whole = torch.cat(list(DataLoader(crops, 4, sampler=range(24))))
    later = torch.cat(list(DataLoader(crops, 4, sampler=range(12, 24), num_workers=2)))
    assert torch.equal(whole[12:], later)
    for other in (TrainingCrops(folder, 16, seed=4), TrainingCrops(folder, 16, seed=3, rank=1)):
        assert not torch.equal(whole, torch.stack([other[index] for index in range(24)]))


def test_small_and_unreadable_pictures_are_left_out_and_counted(folder):
    crops = TrainingCrops(folder, 16)
    assert crops.names == ["a.png", "deep/b.bmp", "deep/er/c.TIFF"]
    assert crops.notice == "left out of 5 pictures: 1 that cannot be read and 1 smaller than 16x16"
    assert TrainingCrops(folder / "deep", 16).notice == ""


def test_a_crop_may_be_the_whole_picture(tmp_path):
    cv2.imwrite(str(tmp_path / "a.png"), coded(16, 16, 0))
    assert np.array_equal(TrainingCrops(tmp_path, 16)[5][0].numpy(), coded(16, 16, 0))


@pytest.mark.parametrize(("patch_size", "sentence"), [(64, "none of the 5 pictures .* 1 that cannot be read and 4 sm")])
def test_nothing_of_use_is_the_users_mistake(folder, patch_size, sentence):
    with pytest.raises(UserError, match=sentence):
        TrainingCrops(folder, patch_size)


def test_a_missing_or_empty_folder_is_the_users_mistake(tmp_path):
    with pytest.raises(UserError, match="there is no folder .*nowhere"):
        TrainingCrops(tmp_path / "nowhere", 16)
    with pytest.raises(UserError, match="no picture"):
        TrainingCrops(tmp_path, 16)


def test_fingerprint_tells_other_pictures(folder):
    before = TrainingCrops(folder, 16).fingerprint()
    assert TrainingCrops(folder, 16, seed=9).fingerprint() == before
    cv2.imwrite(str(folder / "more.png"), coded(40, 40, 5))
    assert TrainingCrops(folder, 16).fingerprint() != before
