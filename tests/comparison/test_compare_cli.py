"""The command line compare.py from end to end: made-up methods, test.py's own output, and every mistake."""
import csv
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

import compare
from model import IDM
from utils.errors import run
from utils.evaluation.evaluate import Result
from utils.evaluation.report import write_scores

ROOT = Path(__file__).resolve().parents[2]
RNG = np.random.default_rng(0)


def write(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imencode(path.suffix, np.asarray(pixels))[1].tofile(path)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """data/Set11 with four pictures, and methods/ with one that is 5 off, one that is 10 off, and one with faults."""
    place = tmp_path_factory.mktemp("place")
    for name, shape in (("house", (40, 40)), ("lighthouse", (40, 48)), ("img_1", (40, 50)), ("img_10", (60, 40))):
        pixels = RNG.integers(60, 190, shape, dtype=np.uint8)
        write(place / "data" / "Set11" / f"{name}.tif", pixels)
        write(place / "methods" / "five off" / f"{name}.tif_ratio_0.1_PSNR_34.15.png", pixels + 5)
        write(place / "methods" / "Ten" / f"{name.upper()}_rec.BMP", pixels + 10)
        if name != "house":
            cut = pixels[:, :39] if name == "img_1" else pixels
            write(place / "methods" / "faulty" / f"{name}_PSNR_40.00.png", cut)
    write(place / "methods" / "faulty" / "farmhouse.png", np.zeros((40, 40), np.uint8))
    write(place / "own" / "house.png", np.zeros((40, 40), np.uint8))
    (place / "empty").mkdir()
    (place / "methods" / "notes").mkdir()
    return place


def call(monkeypatch, place: Path, *flags: str) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setattr(sys, "argv", ["compare.py", "--result_dir", "out", *flags])
    run(compare.main)


def read(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_made_up_methods_in_a_process_of_their_own(place, tmp_path):
    result = subprocess.run([sys.executable, ROOT / "compare.py", "--testset_name", "Set11", "--cs_ratio", "0.1",
                             "--root", "methods", "--with_published", "--pictures", "House,img_10",
                             "--region", "3,4,9,8", "--result_dir", tmp_path / "ö ut"],
                            cwd=place, capture_output=True, text=True, encoding="utf-8")
    assert result.returncode == 0, result.stderr
    # matplotlib may say that it builds its font cache, the first time
    assert [line for line in result.stderr.splitlines() if "font cache" not in line] == []
    assert max(map(len, result.stdout.splitlines())) <= 100
    five, ten = (f"{20 * math.log10(255 / offset):.2f}" for offset in (5, 10))
    lines = [re.split("  +", line) for line in result.stdout.splitlines()]
    assert ["PSNR (dB) / SSIM", "Ten", "faulty", "five off"] in lines
    (house,) = [line for line in lines if line[0] == "house"]
    assert [house[k] for k in (1, 3, 4)] == [f"{ten}+", "-", f"{five}*"]
    (tower,) = [line for line in lines if line[0] == "lighthouse"]
    assert tower[3:5] == ["inf*", "1.0000*"]
    assert ["IDM, T = 3 (TPAMI 2025), published", "32.92", "-", "-", "-", "-"] in lines
    text = " ".join(result.stdout.split())
    assert f"note: notes is left out: {Path('methods/notes')} holds no picture" in text
    assert "Scores are those of Y, OpenCV's full-range BT.601 luminance" in text
    assert "2 of 4 pictures that all methods have: all but house, img_1." in text
    assert "faulty: missing (1): house" in text
    assert "faulty: wrong size (1): img_1_PSNR_40.00.png is 40x39 instead of 40x50" in text
    assert "faulty: extra (1): farmhouse.png" in text
    assert "faulty: claim (2): img_10 claims 40.00 dB, scores inf dB; lighthouse claims" in text
    assert "five off: claim" not in text

    out = tmp_path / "ö ut" / "Set11" / "10"
    assert sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()) == [
        ".lock", "averages.csv", "averages.tex", "figures-together.pdf", "figures-together.png",
        *(f"figures/{name}.{suffix}" for name in ("errors/house", "errors/img_10", "house", "img_10")
          for suffix in ("pdf", "png")), "pictures.tex", "report.html", "scores.csv", "table.md"]
    rows = {(row["method"], row["picture"]): row for row in read(out / "scores.csv")}
    for name in ("house", "lighthouse", "img_1", "img_10"):
        assert float(rows["five off", name]["psnr"]) == pytest.approx(20 * math.log10(255 / 5), abs=1e-9)
        assert float(rows["Ten", name]["psnr"]) == pytest.approx(20 * math.log10(255 / 10), abs=1e-9)
    assert rows["faulty", "house"]["remark"] == "missing: house"
    averages = {row["method"]: row for row in read(out / "averages.csv")}
    assert (averages["faulty"]["pictures"], averages["Ten"]["pictures"]) == ("2", "4")
    assert {row["common_pictures"] for row in averages.values() if row["source"] == "measured"} == {"2"}
    assert averages["PRL-PGD+ (IJCV 2023)"]["psnr"] == "31.7"


def test_own_output_is_reported_as_test_py_prints_it(place, tmp_path, monkeypatch, capsys):
    """Run test.py with a tiny network, and compare what it wrote: folder, names and scores.csv."""
    torch.manual_seed(0)
    IDM(block_out_channels=(32, 64), num_steps=1).save_pretrained(tmp_path / "net")
    printed = subprocess.run([sys.executable, ROOT / "test.py", "--testset_name", "Set11", "--cs_ratio", "0.1",
                              "--block_size", "8", "--weights", tmp_path / "net", "--device", "cpu",
                              "--result_dir", tmp_path / "result"],
                             cwd=place, capture_output=True, text=True, encoding="utf-8", check=True).stdout
    (psnr, ssim), = re.findall(r"Average PSNR: ([\d.]+) dB  SSIM: ([\d.]+)", printed)
    call(monkeypatch, place, "--methods", f"own={tmp_path / 'result'}")
    out = [re.split("  +", line) for line in capsys.readouterr().out.splitlines()]
    assert ["own, in scores.csv", psnr, ssim, "4 of 4"] in out
    noted = {row["name"]: row for row in read(tmp_path / "result" / "Set11" / "10" / "scores.csv")}
    rows = read(place / "out" / "Set11" / "10" / "scores.csv")
    assert [row["picture"] for row in rows] == list(noted)
    for row in rows:
        own = noted[row["picture"]]
        assert (row["recorded_psnr"], row["recorded_ssim"]) == (own["psnr"], own["ssim"])
        # No pixel moves by more than half a level, and so neither does the root of the mean squared error; mostly it
        # stays, but for the variance of rounding, and chance of its size.
        before, after = (255 * 10 ** (-float(score) / 20) for score in (own["psnr"], row["psnr"]))
        assert abs(after - before) <= 0.5
        assert after**2 == pytest.approx(before**2 + 1 / 12, abs=4 * 2 * before * math.sqrt(1 / 12 / 1600))
        assert float(row["ssim"]) == pytest.approx(float(own["ssim"]), abs=2e-3)
        assert row["remark"] == ""  # the names' claims are true


def test_names_that_a_spreadsheet_or_a_terminal_would_obey(tmp_path, monkeypatch, capsys):
    testset = tmp_path / "data" / "red\x1b[31m\nset"
    testset.mkdir(parents=True)
    write(testset / "=1+1.png", np.zeros((9, 9), np.uint8))
    results = [Result("=1+1", {"psnr": 30.25, "ssim": 0.5}, 1.0, 0.1, None)]
    folder = tmp_path / "m" / testset.name / "10"
    write(folder / "=1+1_PSNR_30.25_SSIM_0.5000.png", np.full((9, 9), 8, np.uint8))
    write_scores(folder / "scores.csv", results)
    assert [row["name"] for row in read(folder / "scores.csv")] == ["'=1+1"]
    call(monkeypatch, tmp_path, "--testset_name", testset.name, "--methods", "m=m")
    row, = read(tmp_path / "out" / testset.name / "10" / "scores.csv")
    assert (row["picture"], row["recorded_psnr"]) == ("'=1+1", "30.25")
    out = capsys.readouterr().out
    assert "\x1b" not in out and "red\\x1b[31m\\nset at 10 %: * best" in out and "over all of red\\x1b[31m" in out


def test_methods_and_root_together_in_this_order(place, monkeypatch, capsys):
    call(monkeypatch, place, "--methods", "z=methods/Ten", "a=methods/five off", "--methods", "<b>&=own",
         "--root", "methods", "--cs_ratio", "0.25", "--with_published")
    out = capsys.readouterr().out
    assert [row["method"] for row in read(place / "out" / "Set11" / "25" / "averages.csv")] == [
        "z", "a", "<b>&", "Ten", "faulty", "five off"]
    assert "no averages are published for Set11 at 25 %" in out


def test_sets_ratios_and_methods_in_one_table(place, tmp_path, monkeypatch, capsys):
    """Ten is 10 off everywhere, half is 5 off and has but one ratio of one set; a bad folder ends nothing."""
    shutil.copytree(place / "data", tmp_path / "data")
    shutil.copytree(place / "data" / "Set11", tmp_path / "data" / "{{data}}")
    for testset in ("Set11", "{{data}}"):
        for ratio in ("10", "0.5"):
            shutil.copytree(place / "methods" / "Ten", tmp_path / "m" / "Ten" / testset / ratio)
    shutil.copytree(place / "methods" / "five off", tmp_path / "m" / "half" / "Set11" / "50")
    write(tmp_path / "m" / "strange" / "Set11" / "10" / "farmhouse.png", np.zeros((9, 9), np.uint8))
    write(tmp_path / "m" / "odd" / "Set11" / "10" / "a\x1b[1m.png", np.zeros((9, 9), np.uint8))
    call(monkeypatch, tmp_path, "--testset_name", "Set11,{{data}}", "--cs_ratio", "0.1/0.5", "--root", "m")
    out = capsys.readouterr().out
    rows = [re.split("  +", line) for line in out.splitlines()]
    ten, five = (f"{20 * math.log10(255 / offset):.2f}" for offset in (10, 5))
    head = rows.index(["PSNR (dB) / SSIM", "Set11 at 10 %", "Set11 at 50 %", "{{data}} at 10 %", "{{data}} at 50 %"])
    psnrs = [[cell for cell in row[1:] if cell == "-" or float(cell.strip("*+")) > 1]
             for row in rows[head + 1:head + 3]]
    assert psnrs == [[ten, f"{ten}+", ten, ten], ["-", f"{five}*", "-", "-"]]
    text = " ".join(out.split())
    assert "note: strange is left out: no file in m/strange/Set11/10 is named after" in text
    assert "note: odd is left out: the name of the picture a\\x1b[1m.png" in text and "\x1b" not in out
    found = read(tmp_path / "out" / "averages.csv")
    assert [(row["testset"], row["cs_ratio"], row["method"]) for row in found] == [
        ("Set11", "0.1", "Ten"), ("Set11", "0.5", "Ten"), ("Set11", "0.5", "half"), ("{{data}}", "0.1", "Ten"),
        ("{{data}}", "0.5", "Ten")]
    report = (tmp_path / "out" / "{{data}}" / "50" / "report.html").read_text()
    assert report.count("{{data}} at 50 %") == 2 and report.count('id="data"') == 1  # its title and heading


def test_files_named_otherwise(place, tmp_path, monkeypatch, capsys):
    for number, name in enumerate(("house", "lighthouse"), 1):
        shutil.copy(place / "methods" / "five off" / f"{name}.tif_ratio_0.1_PSNR_34.15.png", tmp_path / f"{number}.png")
    (tmp_path / "map.csv").write_text("1,house\n2,lighthouse\n")
    call(monkeypatch, place, "--methods", f"a={tmp_path}", "--names", str(tmp_path / "map.csv"))
    rows = [row for row in read(place / "out" / "Set11" / "10" / "scores.csv") if row["psnr"]]
    assert [(row["picture"], row["file"]) for row in rows] == [("house", "1.png"), ("lighthouse", "2.png")]


def test_pictures_of_another_ratio_are_noted(place, tmp_path, monkeypatch, capsys):
    for ratio in ("10", "30"):
        shutil.copytree(place / "methods" / "Ten", tmp_path / "Set11" / ratio)
    methods = [f"M{ratio}={tmp_path / 'Set11' / ratio}" for ratio in ("10", "30")]
    call(monkeypatch, place, "--cs_ratio", "0.1", "--methods", *methods)
    notes = [line for line in capsys.readouterr().out.split("\n\n") if line.startswith("note:")]
    assert len(notes) == 1 and notes[0].startswith("note: M30: ") and "at 30 %" in " ".join(notes[0].split())


def test_a_report_too_large_says_so(place, monkeypatch, capsys):
    call(monkeypatch, place, "--root", "methods", "--report_size", "0.01")
    assert re.search(r"shows [0-3] of 4 pictures, see --report_size", " ".join(capsys.readouterr().out.split()))


@pytest.mark.parametrize("flags, message", [
    ([], "nothing to compare"),
    (["--methods", "own"], "NAME=FOLDER, not own"),
    (["--methods", "=own"], "NAME=FOLDER, not =own"),
    (["--methods", "a=own", "a=methods/Ten"], "two methods are named a"),
    (["--methods", "a\nb=own"], "'a\\nb' cannot be printed"),
    (["--methods", "a=nowhere"], "nowhere"),
    (["--methods", "a=own/house.png"], "house.png"),
    (["--methods", "a=empty"], "empty holds no picture"),
    (["--methods", "a=data"], "data/Set11 is the test set itself"),
    (["--root", "nowhere"], "cannot list nowhere"),
    (["--root", "own"], "own has no folder of pictures"),
    (["--methods", "a=methods/Ten", "--cs_ratio", "0.3", "--methods", "b=empty"], "neither empty/Set11/30 nor empty"),
    (["--root", "methods", "--testset_name", "Set11,Samples", "--cs_ratio", "0.1"], "no method has pictures"),
    (["--root", "methods", "--names", "nowhere.csv"], "--names: cannot read nowhere.csv"),
    (["--root", "methods", "--methods", "Ten=own"], "two methods are named Ten"),
    (["--root", "methods", "--testset_name", "absent"], "absent"),
    (["--root", "methods", "--testset_name", ".."], "not .."),
    (["--root", "methods", "--testset_name", ""], "must be a folder in data"),
    (["--root", "methods", "--testset_name", "Samples"], "is named after a picture of the test set"),
    (["--root", "methods", "--cs_ratio", "2"], "(0, 1], not 2"),
    (["--root", "methods", "--pictures", "barn"], "has no picture barn; it has house, img_1, img_10, lighthouse"),
    (["--root", "methods", "--region", "1,2,3,4"], "--pictures"),
    (["--root", "methods", "--pictures", "house", "--region", "1,2,3"], "not 1,2,3"),
    (["--root", "methods", "--pictures", "house", "--region", "1,2,0,4"], "not 1,2,0,4"),
    (["--root", "methods", "--pictures", "house", "--region=-1,2,3,4"], "not -1,2,3,4"),
    (["--root", "methods", "--pictures", "img_1,house", "--region", "35,2,10,4"], "beyond house"),
    (["--root", "methods", "--report_size", "0"], "above 0, not 0"),
    (["--root", "methods", "--result_dir", "own/house.png"], "choose another --result_dir"),
    (["--root", "methods", "--no_such_flag"], "--no_such_flag"),
])
def test_mistakes_end_with_one_sentence(place, monkeypatch, capfd, flags, message):
    with pytest.raises(SystemExit) as stop:
        call(monkeypatch, place, *flags)
    assert stop.value.code == 2
    error = capfd.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error


def test_a_methods_own_folder_is_never_written_into(place, tmp_path, monkeypatch, capsys):
    """There, test.py's scores.csv would be lost."""
    folder = tmp_path / "result" / "Set11" / "10"
    shutil.copytree(place / "methods" / "five off", folder)
    (folder / "scores.csv").write_text("name,psnr,ssim,seconds\n")
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(SystemExit) as ended:
        call(monkeypatch, place, "--methods", f"a={tmp_path / 'result'}", "--result_dir", str(tmp_path / "result"))
    assert ended.value.code == 2
    assert f"error: {folder} holds the pictures of a and their scores; choose another --result_dir\n" == \
        capsys.readouterr().err
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_a_full_disk_ends_with_one_sentence_and_leaves_no_part(place, tmp_path):
    """The limit on a file's size stands in for a full disk: tables fit, the report does not."""
    code = """if True:
        import resource, signal, sys, compare
        from utils.errors import run
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
        try:
            run(compare.main)
        finally:
            print("matplotlib" in sys.modules)"""
    result = subprocess.run([sys.executable, "-c", code, "--root", "methods", "--result_dir", tmp_path], cwd=place,
                            capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert result.returncode == 2
    assert result.stderr.startswith("error: cannot write ")
    assert result.stderr.count("\n") == 1
    assert sorted(path.name for path in (tmp_path / "Set11" / "10").iterdir()) == [
        ".lock", "averages.csv", "averages.tex", "pictures.tex", "scores.csv", "table.md"]
    assert result.stdout.endswith("False\n")  # no figure was asked for
