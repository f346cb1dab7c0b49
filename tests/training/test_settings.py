"""What ratios a run draws, which it tests, and what its folder is called."""
import argparse

import pytest
import torch

from utils.training.settings import Ratios, training_ratios


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
