"""Names of folders as published, for the ratios that they can hold."""
import pytest

from utils.flags import run_name


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
