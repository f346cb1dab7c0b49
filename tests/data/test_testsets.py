"""Test sets from folders, and the samples, compared with what Pillow and scikit-image read."""
import numpy as np
import pytest
import skimage.data
from PIL import Image

from utils.data.testsets import KNOWN_SETS, SAMPLES, load_testset
from utils.errors import UserError


def grey(value: int) -> Image.Image:
    return Image.fromarray(np.full((9, 8), value, np.uint8))


def test_a_folder_is_read_in_order(tmp_path):
    folder = tmp_path / "Büro"
    folder.mkdir()
    grey(2).save(folder / "b.PNG")
    grey(1).save(folder / "a.tif")
    (folder / "notes.txt").write_text("not a picture")
    pictures = load_testset("Büro", tmp_path)
    assert [(picture.name, picture.luminance[0, 0], picture.ycrcb) for picture in pictures] == [
        ("a", 1, None), ("b", 2, None)]


def test_names_stay_apart_where_only_the_suffix_differs(tmp_path):
    (tmp_path / "set").mkdir()
    for name in ("a.png", "a.tif", "b.png", "c.1.png"):
        grey(0).save(tmp_path / "set" / name)
    pictures = load_testset("set", tmp_path)
    assert [picture.name for picture in pictures] == ["a.png", "a.tif", "b", "c.1"]
    assert [picture.file for picture in pictures] == ["a.png", "a.tif", "b.png", "c.1.png"]


def test_no_two_pictures_have_one_name(tmp_path):
    (tmp_path / "set").mkdir()
    for name in ("a.png", "a.png.png", "b.tif", "b.tif.png"):
        grey(0).save(tmp_path / "set" / name)
    assert [picture.name for picture in load_testset("set", tmp_path)] == ["a", "a.png.png", "b", "b.tif.png"]


def test_a_link_to_a_picture_that_is_not_there_is_not_passed_over(tmp_path):
    (tmp_path / "set").mkdir()
    grey(0).save(tmp_path / "set" / "a.png")
    (tmp_path / "set" / "b.png").symlink_to(tmp_path / "unmounted" / "b.png")
    with pytest.raises(UserError, match="b.png: No such file"):
        load_testset("set", tmp_path)


def test_a_folder_named_samples_is_not_passed_over(tmp_path):
    (tmp_path / "Samples").mkdir()
    with pytest.raises(UserError, match=r"Samples are photographs that need no files; rename .*Samples"):
        load_testset("Samples", tmp_path)


def test_the_samples_need_no_files(tmp_path, monkeypatch):
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("the samples went to the network"))
    pictures = load_testset("Samples", tmp_path / "nowhere")
    assert len(pictures) == len(SAMPLES) == 8
    assert all(picture.luminance.shape == (256, 256) for picture in pictures)
    samples = {picture.name: picture for picture in pictures}
    assert (samples["camera"].luminance == skimage.data.camera()[128:384, 128:384]).all()
    assert samples["camera"].ycrcb is None and samples["camera"].file == "camera.png"
    rgb = skimage.data.chelsea()[22:278, 97:353]
    assert np.abs(samples["chelsea"].luminance - rgb @ [0.299, 0.587, 0.114]).max() <= 0.51
    assert samples["chelsea"].ycrcb.shape == (256, 256, 3)


@pytest.mark.parametrize("name", KNOWN_SETS)
def test_a_known_set_that_is_missing_is_explained(tmp_path, name):
    with pytest.raises(UserError) as error:
        load_testset(name, tmp_path)
    assert str(tmp_path / name) in str(error.value)
    assert KNOWN_SETS[name] in str(error.value)


def test_mistakes_name_the_folder_or_the_file(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "text.png").write_text("not a picture")
    for name, why in (("absent", "no folder"), ("empty", "holds no picture"), ("broken", "text.png")):
        with pytest.raises(UserError, match=f"{name}.*{why}|{why}.*{name}"):
            load_testset(name, tmp_path)
