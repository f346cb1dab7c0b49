"""`python -m baselines.train` from end to end on crops of two shipped pictures."""
import os
import subprocess
import sys
from pathlib import Path

import cv2
import pytest
import skimage
import torch

from baselines import train
from baselines.ddnm import Sampling
from baselines.ddpm import DDNM, load_ddpm
from tests.conftest import ROOT
from utils.errors import run
from utils.training.state import load_newest_state

FLAGS = ["--widths", "8,8", "--patch_size", "16", "--batch_size", "2", "--epoch", "2", "--iters_per_epoch", "2",
         "--ema", "0.9", "--device", "cpu"]
NAME = "ddpm_8_8"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for name in ("astronaut", "camera"):
        picture = cv2.imread(str(Path(skimage.__file__).parent / "data" / f"{name}.png"))[100:140, 200:250]
        cv2.imwrite(str(folder / f"{name}.png"), picture)
    return folder


def flags(pictures: Path, place: Path, *more: str) -> list[str]:
    return [*FLAGS, "--train_dir", str(pictures), "--no_cache", "--model_dir", str(place / "weight"), "--log_dir",
            str(place / "log"), *more]


def call(pictures: Path, place: Path, *more: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train", *flags(pictures, place, *more)])
        run(train.main)


def test_an_interrupted_run_ends_with_the_weights_of_one_that_was_not(pictures, tmp_path, capsys):
    call(pictures, tmp_path / "whole")
    call(pictures, tmp_path / "parts", "--max_iters", "1")
    call(pictures, tmp_path / "parts", "--max_iters", "3")
    call(pictures, tmp_path / "parts")
    printed = capsys.readouterr().out
    assert "resumed from iteration 3" in printed and "tests      none" in printed and "operator" not in printed
    weights = {name: load_ddpm(tmp_path / name / "weight" / NAME / "pretrained")[0] for name in ("whole", "parts")}
    average = load_newest_state(tmp_path / "whole" / "weight" / NAME)[0].ema
    for name, value in weights["whole"].state_dict().items():
        assert torch.equal(value, weights["parts"].state_dict()[name])
        assert torch.equal(value, average[name])  # what is kept is the average


def test_what_is_trained_reconstructs(pictures, tmp_path):
    from tests.baselines.test_ddpm import measured

    call(pictures, tmp_path, "--max_iters", "1")
    operator, y = measured()
    net = DDNM.from_pretrained(tmp_path / "weight" / NAME / "pretrained", Sampling(3))
    assert (operator.A(net(y, operator)) - y).abs().max() < 1e-4


@pytest.mark.parametrize(("more", "sentence"), [
    (["--widths", "8,12"], "must be multiples of 8"),
    (["--patch_size", "15"], "--patch_size must be a multiple of 2 here, not 15"),
    (["--cs_ratio", "0.1"], "unrecognized arguments: --cs_ratio"),
    (["--train_dir", "nowhere"], "nowhere"),
])
def test_a_mistake_is_answered_by_one_sentence(pictures, tmp_path, capsys, more, sentence):
    with pytest.raises(SystemExit) as ended:
        call(pictures, tmp_path, *more)
    error = capsys.readouterr().err
    assert ended.value.code == 2 and sentence in error and error.count("\n") == 1


@pytest.mark.slow
def test_two_processes_train_as_one_that_accumulates_two_batches(pictures, tmp_path):
    alone = [sys.executable, "-m", "baselines.train", *flags(pictures, tmp_path / "one", "--accumulate", "2")]
    both = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m",
            "baselines.train", *flags(pictures, tmp_path / "two")]
    for command in (alone, both):
        subprocess.run(command, cwd=ROOT, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    one, two = (load_newest_state(tmp_path / name / "weight" / NAME)[0].model for name in ("one", "two"))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-6)
