"""Names of folders as published, for the ratios that they can hold."""
from argparse import ArgumentTypeError
from pathlib import Path

import pytest

from compare import method
from utils.flags import file_path, run_name
from utils.training.settings import parse_settings


@pytest.mark.parametrize(("ratios", "name"), [
    ([0.1], "R_0.10_T_3_B_32"),
    ([1.0], "R_1.00_T_3_B_32"),
    ([0.07], "R_0.07_T_3_B_32"),
    ([0.1, 0.5], "R_0.10-0.50_T_3_B_32"),
    ([0.104], "R_0.104_T_3_B_32"),  # the published weights of 0.10 are not for it
    ([0.001], "R_0.001_T_3_B_32"),
])
def test_a_ratio_never_passes_for_another(ratios, name):
    assert run_name(ratios, 3, 32) == name


def test_a_home_behind_an_equals_sign_is_found(monkeypatch):
    """Shells leave it alone there."""
    monkeypatch.setenv("HOME", "/home/reader")
    assert file_path("~/x") == Path("/home/reader/x") and file_path("a~") == Path("a~")
    assert method("IDM=~/x") == ("IDM", Path("/home/reader/x"))
    monkeypatch.setattr("sys.argv", ["train.py", "--base_model=~/sd", "--train_dir=~/x"])
    settings = parse_settings("")
    assert (settings.base_model, settings.train_dir) == ("/home/reader/sd", Path("/home/reader/x"))
    with pytest.raises(ArgumentTypeError, match="home of a user who is not here: ~nobody-of-that-name"):
        file_path("~nobody-of-that-name/x")
