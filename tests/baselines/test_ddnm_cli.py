"""test.py --method ddnm from end to end, with a tiny DDPM on small pictures, and the mistakes a user can make."""
import csv
import sys
from argparse import Namespace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline

import compare
from baselines import flags
from baselines.ddnm import Sampling
from baselines.ddpm import DDNM, load_ddpm, schedule
from tests.baselines.test_ddpm import tiny
from tests.evaluation.test_test_cli import script
from utils import weights
from utils.data.testsets import load_testset
from utils.errors import run
from utils.measurement import Measurement

METHOD = ["--method", "ddnm", "--weights", "ddpm", "--device", "cpu", "--cs_ratio", "0.25", "--block_size", "8",
          "--testset_name", "set"]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with the pipeline ddpm, and two pictures in data/set."""
    place = tmp_path_factory.mktemp("place")
    DDPMPipeline(tiny(), schedule()).save_pretrained(place / "ddpm")
    (place / "data" / "set").mkdir(parents=True)
    for name, size in (("a", (16, 24)), ("b", (13, 10))):
        pixels = np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8)
        cv2.imwrite(str(place / "data" / "set" / f"{name}.png"), pixels)
    return place


def call(monkeypatch, place: Path, *flags: str) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setattr(sys, "argv", ["test.py", *METHOD, *flags])
    run(script.main, script.WeightsError)


def by_hand(place: Path, sampling: Sampling, noise: float = 0.0) -> list[float]:
    """PSNR of the pictures by the sampler alone: measured, reconstructed and scored without test.py's code."""
    net, scores = DDNM.from_pretrained(place / "ddpm", sampling), []
    measurement = Measurement("cs", {"cs_ratio": 0.25, "block_size": 8}, noise=(noise, noise))
    for picture in load_testset("set", place / "data"):
        truth = picture.luminance.astype(float)
        height, width = truth.shape
        x = torch.zeros(1, 1, -(-height // 8) * 8, -(-width // 8) * 8)
        x[0, 0, :height, :width] = torch.from_numpy(truth / 255)
        operator = measurement.draw_for([picture.file], tuple(x.shape[2:]))
        y, level = measurement.add_noise(operator.A(x), [measurement.generator(picture.file, "noise")])
        found = 255 * net(y, operator, level)[0, 0, :height, :width].clamp(0, 1).double().numpy()
        scores.append(10 * np.log10(255**2 / ((found - truth) ** 2).mean()))
    return scores


def psnr(path: Path) -> list[float]:
    with path.open(newline="", encoding="utf-8") as file:
        return [float(row["psnr"]) for row in csv.DictReader(file)]


@pytest.mark.parametrize(("given", "sampling", "noise", "folder"), [
    (["--sampling_steps", "5"], Sampling(5), 0.0, "25"),
    (["--sampling_steps", "6", "--eta", "0.3", "--travel_length", "2", "--travel_repeat", "2", "--noise", "0.05"],
     Sampling(6, 0.3, 2, 2), 0.05, "25_noise_0.05"),
])
def test_results_are_the_samplers_and_compare_reads_them(monkeypatch, place, capsys, given, sampling, noise, folder):
    call(monkeypatch, place, *given)
    assert f"DDNM of {sampling.steps} steps, eta = {sampling.eta:g}" in capsys.readouterr().out
    scores = psnr(place / "result" / "set" / folder / "scores.csv")
    assert scores == pytest.approx(by_hand(place, sampling, noise), abs=1e-3)
    monkeypatch.setattr(sys, "argv", ["compare.py", "--testset_name", "set", "--cs_ratio", "0.25", "--methods",
                                      f"DDNM=result/set/{folder}", "--result_dir", "compared"])
    run(compare.main)
    assert psnr(place / "compared" / "set" / "25" / "scores.csv") == pytest.approx(scores, abs=0.01)  # of 8 bits


def test_without_weights_the_ddpm_that_comes_along_is_taken(monkeypatch, place):
    monkeypatch.chdir(place)
    args = Namespace(weights=None, model_dir=None, epoch=None, compile=False, attention_window=None, seed=1,
                     **dict.fromkeys(flags.SETTINGS))
    source = flags.DdnmFlags.of(args).source
    unet, scheduler = load_ddpm(source)
    assert source == weights.BESIDE / "ddpm" and next(unet.parameters()).dtype == torch.float32
    assert unet.config.in_channels == 1 and scheduler.config.num_train_timesteps == 1000
    assert not any("_name_or_path" in file.read_text() for file in source.rglob("*.json"))  # whose machine it was
    size = sum(file.stat().st_size for file in source.rglob("*") if file.is_file())
    assert size < 6e6


def test_no_weights_anywhere_are_a_sentence(monkeypatch, place, capsys):
    monkeypatch.chdir(place)
    monkeypatch.setattr(weights, "BESIDE", place / "none")
    monkeypatch.setattr(sys, "argv", ["test.py", "--method", "ddnm", "--testset_name", "set"])
    with pytest.raises(SystemExit) as ended:
        run(script.main, script.WeightsError)
    assert ended.value.code == 2 and "there is no DDPM in weight/ddpm; name one" in capsys.readouterr().err


@pytest.mark.parametrize(("given", "sentence"), [
    (["--eta", "1.5"], "eta must lie in [0, 1], not 1.5"),
    (["--sampling_steps", "0"], "steps must be at least 1, not 0"),
    (["--sampling_steps", "1001"], "the DDPM has 1000 steps"),
    (["--compile"], "--compile does not apply to --method ddnm"),
    (["--weights", "data"], "cannot load a DDPM from data"),
    (["--method", "idm", "--eta", "0.5"], "--eta is a setting of --method ddnm"),
])
def test_a_mistake_is_answered_by_one_sentence(monkeypatch, place, capsys, given, sentence):
    with pytest.raises(SystemExit) as ended:
        call(monkeypatch, place, *given)
    error = capsys.readouterr().err
    assert ended.value.code == 2 and sentence in error and error.count("\n") == 1
