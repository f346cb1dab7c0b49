"""Published averages, against what the paper's abstract claims and what README repeats."""
import re
from pathlib import Path

import pytest

from utils.comparison.published import published_averages

SETS, RATIOS = ("Set11", "CBSD68", "Urban100", "DIV2K"), (0.1, 0.3, 0.5)
README = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8")


def test_idm_leads_by_up_to_2_64_db_as_its_abstract_says():
    leads = []
    for testset in SETS:
        for ratio in RATIOS:
            *others, (name, psnr) = published_averages(testset, ratio)
            assert name.startswith("IDM")
            leads.append(psnr - max(row.psnr for row in others))
    assert max(leads) == pytest.approx(2.64)
    assert min(leads) > 0


def test_readme_repeats_the_same_numbers():
    rows = re.findall(r"^\| (.+?) \| \*published\* \| (.+) \|$", README, re.MULTILINE)
    assert rows
    for name, cells in rows:
        for testset, cell in zip(SETS, cells.split(" | "), strict=True):
            for ratio, number in zip(RATIOS, cell.split(" / "), strict=True):
                (found,) = [row.psnr for row in published_averages(testset, ratio) if row.name[:6] == name[:6]]
                assert found == float(number)


def test_what_is_not_published_has_no_row():
    names = {ratio: [row.name.split("+")[0] for row in published_averages("Set11", ratio)] for ratio in RATIOS}
    assert "MR-CCSNet" not in names[0.1]
    assert "MR-CCSNet" in names[0.5]
    assert "DGUNet" not in names[0.3]
    assert [len(names[ratio]) for ratio in RATIOS] == [8, 6, 9]
    assert published_averages("Set11", 0.25) == published_averages("Set14", 0.1) == []
