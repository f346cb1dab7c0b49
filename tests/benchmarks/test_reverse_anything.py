"""The second paper's table: what its cells say of given measurements, and what it counts and chooses."""
import cv2
import pytest
import torch

from baselines.ddpm import schedule
from benchmarks.machine import END, START
from benchmarks.reverse_anything import choose_pictures, flop, held_by_ddpm, held_by_idm
from benchmarks.reverse_anything_report import markdown, show

RESULTS = {
    "machine": {"device": "a CPU"},
    "settings": {"cs_ratio": [0.1, 0.5], "pictures": 3, "testset_name": "CBSD68", "teraflop": 15, "patch_size": 64,
                 "seed": 1, "width": 32, "shuffle": 2, "step_number": 3},
    "training": {"IDM, first paper": {"iterations": 1234}, "DDPM with DDNM": {"iterations": 567}},
    "scores": {
        "IDM, first paper, 3 steps, 10 %": {"psnr": 23.456, "ssim": 0.61234},
        "IDM, first paper, 3 steps, 50 %": {"psnr": 31.0, "ssim": 0.9},
        "DDPM with DDNM, 10 steps, 10 %": {"psnr": 15.0, "ssim": 0.3},
        "DDPM with DDNM, 10 steps, 50 %": {"psnr": 25.0, "ssim": 0.7},
        "DDPM with DDNM, 100 steps, 10 %": {"psnr": 20.0, "ssim": 0.5},
        "DDPM with DDNM, 100 steps, 50 %": {"psnr": 28.0, "ssim": 0.8},
    },
    "held_mb": {"IDM, first paper, none": 80.0, "IDM, first paper, both": 20.0, "DDPM with DDNM, none": 50.0},
    "seconds": {"an image": {"IDM, first paper, 3 steps": 2.0, "DDPM with DDNM, 10 steps": 5.0,
                             "DDPM with DDNM, 100 steps": 50.0}},
}


def test_the_table_says_what_was_measured():
    lines = markdown(RESULTS).splitlines()
    cells = "23.46 / 0.6123 | 31.00 / 0.9000 | 2.00 | 25.0 | 80.0 | 20.0 | 75.0 % | 1,234"
    assert f"| IDM, first paper, 3 steps | {cells} |" in lines
    assert "| DDPM with DDNM, 10 steps | 15.00 / 0.3000 | 25.00 / 0.7000 | 5.00 | 10.0 | 50.0 |  |  | 567 |" in lines


def test_the_table_replaces_the_one_before_and_nothing_else(tmp_path):
    report, figure = tmp_path / "report.md", tmp_path / "figure.png"
    report.write_text(f"before\n{START}\nstale\n{END}\nafter\n", encoding="utf-8")
    show(RESULTS, report, figure)
    text = report.read_text(encoding="utf-8")
    assert text.startswith(f"before\n{START}\n**Measured") and text.endswith(f"{END}\nafter\n") and "stale" not in text
    assert cv2.imread(str(figure)).std() > 10


def test_pictures_are_spread_over_the_set_and_linked_anew(tmp_path):
    folder, into = tmp_path / "set", tmp_path / "chosen"
    folder.mkdir()
    for number in range(9):
        (folder / f"{number}.png").write_bytes(b"")
    for count, names in ((2, ["0.png", "4.png"]), (3, ["0.png", "3.png", "6.png"])):
        assert choose_pictures(folder, count, into) == count
        assert sorted(path.name for path in into.iterdir()) == names


def test_operations_of_a_step_are_those_of_its_matrix_products():
    def step(net: torch.nn.Module, x: torch.Tensor) -> None:
        net(x.flatten(1)).sum().backward()

    # Forward and the gradient of the weights, 2 · 3 · 16 · 5 each; x needs none.
    assert flop(lambda: torch.nn.Linear(16, 5), step, side=4, batch=3) == 2 * 2 * 3 * 16 * 5


def test_a_reversible_step_holds_less_and_two_crops_twice_as_much_as_one():
    config = {"block_out_channels": (32, 64), "num_steps": 1, "shuffle": 2}
    assert held_by_idm(config, 32, 1, "both") < 0.6 * held_by_idm(config, 32, 1, "none")
    assert held_by_ddpm(schedule(), 32, 2) == pytest.approx(2 * held_by_ddpm(schedule(), 32, 1), rel=0.2)
