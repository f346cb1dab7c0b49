"""What a run draws ratios from, which it tests and what its folder is called; with what settings it may go on."""
import argparse
import re
from pathlib import Path

import pytest
import torch

from model.operators import OPERATORS
from tests.training.test_step import Toy
from utils.errors import UserError
from utils.training.flags import Ratios, training_ratios
from utils.training.settings import Settings, check_configuration


def test_ratios_are_a_number_several_or_a_range():
    assert training_ratios("0.1") == Ratios((0.1,)) and training_ratios("0.5,0.1/0.1") == Ratios((0.1, 0.5))
    assert training_ratios("0.05-0.5") == Ratios((0.05, 0.5), is_range=True)
    for text, words in [("0.5-0.5", "from a lower ratio to a higher one"), ("0-0.5", r"must lie in \(0, 1\], not 0"),
                        ("0.1-1.1", r"must lie in \(0, 1\], not 1.1"), ("a-b", "must be a number"),
                        ("0.1-0.2-0.3", "must be a number"), (".-.", "must be a number")]:
        with pytest.raises(argparse.ArgumentTypeError, match=words):
            training_ratios(text)


def test_draws_are_uniform():
    generator = torch.Generator().manual_seed(0)
    drawn = torch.tensor([Ratios((0.2, 0.6), is_range=True).draw(generator) for _ in range(4000)])
    assert 0.2 <= drawn.min() < 0.201 and 0.599 < drawn.max() <= 0.6
    assert drawn.mean() == pytest.approx(0.4, abs=0.01) and drawn.std() == pytest.approx(0.4 / 12**0.5, rel=0.03)
    listed = [Ratios((0.1, 0.3, 0.5)).draw(generator) for _ in range(3000)]
    assert {ratio: round(listed.count(ratio) / 1000, 1) for ratio in listed} == {0.1: 1.0, 0.3: 1.0, 0.5: 1.0}


def test_names_and_tests_of_a_range_are_not_those_of_its_ends():
    for text, name, tested in [("0.1", "R_0.10_T_3_B_32", [0.1]),
                               ("0.05/0.5", "R_0.05-0.50_T_3_B_32", [0.05, 0.5]),
                               ("0.05-0.5", "R_0.05to0.50_T_3_B_32", [0.1, 0.3, 0.5]),
                               ("0.2-0.25", "R_0.20to0.25_T_3_B_32", [0.2, 0.25])]:
        assert training_ratios(text).run_name(3, 32) == name
        assert training_ratios(text).to_test == tested


@pytest.mark.parametrize(("flags", "name"), [
    ({"noise": (0.0, 0.05)}, "R_0.10_T_3_B_32_noise_0-0.05"),
    ({"cs_ratio": Ratios((0.1, 0.5), is_range=True), "step_number": 2}, "R_0.10to0.50_T_2_B_32"),
    ({"operator": ("cs", "none")}, "there is no operator none"),
    ({"operator_settings": ("keep=0.5",)}, "--operator_settings of cs takes no keep=0.5"),
    ({"operator": ("cs", "toy"), "operator_settings": ("scale=2",)}, "must say which: cs.KEY=VALUE, not scale=2"),
    ({"operator": ("toy",), "cs_ratio": Ratios((0.3,))}, "--cs_ratio does not apply to the operator toy"),
    ({"operator": ("toy",), "block_size": 16}, "--block_size does not apply to the operator toy"),
    ({"operator": ("toy",)}, "toy_scale_2_T_3"),
])
def test_operators_and_noise_are_in_the_runs_name_or_refused(monkeypatch, flags, name):
    monkeypatch.setitem(OPERATORS, "toy", Toy)
    if " " not in name:
        assert Settings(**flags).completed().name == name
        return
    with pytest.raises(UserError, match=re.escape(name)):
        Settings(**flags).completed()


def test_a_run_goes_on_only_with_the_settings_that_decide_its_weights():
    saved, folder = Settings(precision="fp32").completed().deciding(), Path("weight")
    free = Settings(precision="fp32", epoch=7, invertible="none", compile=True, model_dir=folder, max_iters=3)
    check_configuration(saved, free.completed().deciding(), folder)
    other = Settings(precision="fp32", batch_size=4, ema=0.9, cs_ratio=Ratios((0.1, 0.3))).completed().deciding()
    with pytest.raises(UserError, match="weight holds a run with other settings: batch_size was 8, is 4; "
                                        "cs_ratio was 0.1, is 0.1 / 0.3; ema was None, is 0.9; use the same"):
        check_configuration(saved, other, folder)
    # An epoch's number decides where the rate follows from it; states know nothing of settings younger than they are.
    cosine = [Settings(lr_schedule="cosine", warm_up=0, epoch=epoch).deciding() for epoch in (5, 6)]
    with pytest.raises(UserError, match="epoch was 5, is 6; use"):
        check_configuration(*cosine, folder)
    young = {name: value for name, value in saved.items() if name != "loss"}
    check_configuration(young, saved, folder)
    with pytest.raises(UserError, match="loss was l1, is log_mse"):
        check_configuration(young, {**saved, "loss": "log_mse"}, folder)
