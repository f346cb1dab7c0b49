"""Photographs by the command line, against what test.py's evaluation makes of them and against the written files."""
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import skimage
import torch
from skimage.metrics import peak_signal_noise_ratio

import reconstruct
from model import IDM
from model.operators import BlockCompressedSensing
from tests.conftest import ROOT
from utils.data.images import read_picture
from utils.data.testsets import Picture
from utils.errors import run
from utils.evaluation.evaluate import evaluate
from utils.evaluation.photograph import fitting_window, window_note
from utils.evaluation.protocol import Protocol
from utils.measurement import Measurement

PHOTOGRAPHS = Path(skimage.__file__).parent / "data"
OPERATOR = {"cs_ratio": 0.9, "block_size": 8}


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """Fresh ones, which give about the back-projection."""
    path = tmp_path_factory.mktemp("weights") / "small"
    torch.manual_seed(0)
    IDM.compact(32, 3, shuffle=2).save_pretrained(path)
    return path


@pytest.fixture
def photos(tmp_path) -> Path:
    """A folder of a colour photograph and, below it, a grey one, both of odd sizes."""
    folder = tmp_path / "holiday"
    (folder / "day 2").mkdir(parents=True)
    cat = cv2.imread(str(PHOTOGRAPHS / "chelsea.png"))[100:147, 150:203]
    cv2.imwrite(str(folder / "cat.png"), cat)
    cv2.imwrite(str(folder / "day 2" / "coins.tif"), cv2.imread(str(PHOTOGRAPHS / "coins.png"), 0)[:30, :61])
    (folder / "notes.txt").write_text("no picture")
    return folder


@pytest.fixture
def call(weights, tmp_path, monkeypatch, capsys):
    """Run reconstruct.py; returns exit status, stdout and stderr."""
    def program(*words) -> tuple[int, str, str]:
        ratio = [] if "--operator" in words else ["--cs_ratio", "0.9", "--block_size", "8"]
        monkeypatch.setattr(sys, "argv", ["reconstruct.py", *map(str, words), "--weights", str(weights), *ratio,
                                          "--result_dir", str(tmp_path / "result")])
        status = 0
        try:
            run(reconstruct.main, reconstruct.WeightsError)
        except SystemExit as end:
            status = end.code
        return status, *capsys.readouterr()
    return program


def test_photographs_are_reconstructed_as_a_test_set_is(call, photos, weights, tmp_path):
    status, out, err = call(photos, "--keep", "measured,back_projection")
    assert (status, err) == (0, f"note: not read as pictures: {photos / 'notes.txt'}\n")
    folder = tmp_path / "result" / "90" / "holiday"
    assert sorted(str(path.relative_to(folder)) for path in folder.rglob("*.*")) == [
        "cat.png", "cat_back_projection.png", "cat_measured.npy", "day 2/coins.png", "day 2/coins_back_projection.png",
        "day 2/coins_measured.npy"]
    net = IDM.from_checkpoint(weights)
    for name, file in (("cat", photos / "cat.png"), ("day 2/coins", photos / "day 2" / "coins.tif")):
        truth, ycrcb = read_picture(file)
        result, = evaluate(net, [Picture(file.stem, truth, ycrcb, file.name)], Protocol(Measurement("cs", OPERATOR)))
        written = read_picture(folder / f"{name}.png")[0]
        assert written.shape == truth.shape
        errors = np.abs(written - result.reconstruction)
        assert errors.max() <= 0.5 if ycrcb is None else errors.mean() < 1  # colours are cut off where they must
        line, = (line for line in out.splitlines() if f"{name}.png" in line)
        assert f"PSNR: {result.psnr:.2f} dB  SSIM: {result.ssim:.4f}" in line
        assert abs(peak_signal_noise_ratio(truth, written) - result.psnr) < 0.3
        assert f"{truth.shape[1]}x{truth.shape[0]} " in line and f"{result.density:.3g} measurements a pixel" in line


def test_what_is_kept_is_what_was_measured(call, photos, tmp_path):
    call(photos / "cat.png", "--keep", "measured,back_projection")
    (target,) = (tmp_path / "result").rglob("cat_measured.npy")
    y, measurement = torch.from_numpy(np.load(target)), Measurement("cs", OPERATOR)
    operator = measurement.draw_for(["cat.png"], (48, 56))
    assert isinstance(operator, BlockCompressedSensing) and y.shape == (48 * 56 // 64, 58)
    picture = operator.A_adjoint(y[None])[0, 0, :47, :53].clamp(0, 1) * 255
    written = read_picture(target.with_name("cat_back_projection.png"))[0]
    assert np.abs(picture.numpy() - written).mean() < 1
    truth = torch.from_numpy(read_picture(photos / "cat.png")[0]).float() / 255
    x = torch.nn.functional.pad(truth, (0, 3, 0, 1))[None, None]
    assert torch.equal(operator.A(x)[0], y)


def test_a_file_that_cannot_be_read_does_not_stop_the_others(call, photos, tmp_path):
    (photos / "broken.jpg").write_bytes((PHOTOGRAPHS / "rocket.jpg").read_bytes()[:5000])
    status, out, err = call(photos)
    assert status == 2 and f"error: cannot read {photos / 'broken.jpg'}" in err
    assert err.endswith("error: 1 of 3 photographs could not be read\n") and "Traceback" not in err
    assert sorted(path.name for path in (tmp_path / "result").rglob("*.png")) == ["cat.png", "coins.png"]


def test_no_reconstruction_takes_the_place_of_another_or_is_reconstructed_again(call, photos, tmp_path):
    shutil.copy(photos / "cat.png", tmp_path / "cat.png")
    status, _, err = call(photos / "cat.png", tmp_path / "cat.png")
    assert status == 2 and "would both be" in err and not list((tmp_path / "result").rglob("*.png"))
    cv2.imwrite(str(photos / "cat.bmp"), np.zeros((9, 9), np.uint8))
    for _ in range(2):
        assert call(tmp_path, photos / "day 2" / "coins.tif")[0] == 0  # which is in the folder as well
        names = sorted(path.name for path in (tmp_path / "result").rglob("*.png"))
        assert names == ["cat.bmp.png", "cat.png", "cat.png.png", "coins.png"]


def test_names_of_photographs_may_be_as_long_as_file_systems_take(call, photos, tmp_path):
    for name in ("n" * 250 + ".jpeg", "n" * 250 + ".png", "m" * 240 + ".png"):
        cv2.imwrite(str(tmp_path / name), np.zeros((9, 9), np.uint8))
        shutil.move(tmp_path / name, photos / name)
    assert call(photos, "--keep", "measured,back_projection")[0] == 0
    assert len(list((tmp_path / "result").rglob("*.*"))) == 5 * 3


def test_mistakes_are_a_sentence(call, photos, tmp_path):
    (tmp_path / "empty").mkdir()
    for words, said in (((tmp_path / "none.png",), "there is no photograph"), ((tmp_path / "empty",), "no picture"),
                        ((photos, "--cs_ratio", "2"), "must lie in (0, 1]"),
                        ((photos, "--operator", "nonsense"), "--operator"),
                        ((photos, "--operator", "mri", "--operator_settings", "complex_images=true"), "of 2 channels"),
                        ((photos, "--operator", "deblurring", "--operator_settings", "side=4"), "side must be odd"),
                        ((photos, "--operator", "ct", "--operator_settings", "angles=0"), "angles must be")):
        status, out, err = call(*words)
        *notes, sentence = err.splitlines()
        assert status == 2 and said in sentence and all(note.startswith("note: not read") for note in notes), words


def test_large_pictures_have_windows_unless_somebody_chose():
    assert fitting_window((None, None), 512 * 512) == (None, None)
    assert fitting_window((None, None), 512 * 513) == (32, 32)
    assert fitting_window((16, None), 10**7) == (16, None)
    assert fitting_window((16, None), 100, asked=64) == (64, 64)


def test_windows_are_told_where_there_is_attention_alone():
    for attention, told in ((True, ["attention in windows of 32 tokens"]), (False, []), ((False, True), ["attention in "
                            "windows of 16 tokens"])):
        net = IDM.compact(32, 1, shuffle=2, attention=attention)
        assert window_note(net) == []
        net.attention_window = (32, 16)
        assert window_note(net) == told


def test_ctrl_c_is_heard_within_an_operation_that_takes_minutes(weights, tmp_path):
    """One product of all pairs of tokens of this picture is 10^13 multiplications."""
    picture = tmp_path / "large.png"
    cv2.imwrite(str(picture), np.zeros((2400, 2400), np.uint8))
    program = subprocess.Popen(
        [sys.executable, "reconstruct.py", str(picture), "--weights", str(weights), "--result_dir", str(tmp_path / "r"),
         "--attention_window", "1000000"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))  # whatever started the tests
    try:
        assert "T = 3" in program.stdout.readline()
        time.sleep(5)  # wherever it is then
        program.send_signal(signal.SIGINT)
        out, err = program.communicate(timeout=60)
    finally:
        program.kill()
    assert program.returncode == 130 and err == "interrupted\n" and out == ""
    assert [path for path in (tmp_path / "r").rglob("*") if path.is_file()] == []
