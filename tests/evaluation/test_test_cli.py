"""The command line test.py from end to end, with a tiny network, and every mistake a user can make with it."""
import csv
import importlib.util
import math
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from skimage.metrics import structural_similarity

from model import IDM, SelfEnsemble
from model.operators import OPERATORS, LinearOperator
from tests.test_files import held_by_another_process
from tests.training.test_distributed import free_port
from utils import files, weights
from utils.data.testsets import load_testset, result_name
from utils.errors import UserError, run
from utils.evaluation import METRICS, speed
from utils.evaluation.evaluate import evaluate
from utils.evaluation.metrics import Metric
from utils.evaluation.protocol import Protocol
from utils.measurement import Measurement
from utils.weights import WeightFlags

ROOT = Path(__file__).resolve().parents[2]
SIZES = {"grey": (40, 50), "tiny": (3, 5), "ümlaut": (32, 32)}


def load_script():
    spec = importlib.util.spec_from_file_location("test_script", ROOT / "test.py")  # `import test` is Python's own
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


script = load_script()


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with weights/tiny, and data/set and data/other."""
    place = tmp_path_factory.mktemp("place")
    torch.manual_seed(0)
    net = IDM(block_out_channels=(32, 64), num_steps=1)
    net.save_pretrained(place / "weight" / "compact")
    published = place / "published" / "R_0.10_T_1_B_8"
    published.mkdir(parents=True)
    torch.save(net.official_state_dict(), published / "net_params_50.pkl")
    rng = np.random.default_rng(0)
    for folder in ("set", "other"):
        (place / "data" / folder).mkdir(parents=True)
    for name, size in SIZES.items():
        pixels = rng.integers(0, 256, size, dtype=np.uint8)
        cv2.imencode(".png", pixels)[1].tofile(place / "data" / "set" / f"{name}.png")
    colours = rng.integers(100, 156, (32, 20, 3), dtype=np.uint8)
    for file in ("twin.png", "twin.bmp"):
        cv2.imwrite(str(place / "data" / "other" / file), colours)
    return place


def call(monkeypatch, place: Path, *flags: str) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setattr(sys, "argv", ["test.py", "--device", "cpu", *flags])
    run(script.main, script.WeightsError)


def read_scores(folder: Path) -> dict[str, tuple[float, float, float]]:
    with open(folder / "scores.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["name", "psnr", "ssim", "seconds"]
    return {name: tuple(map(float, numbers)) for name, *numbers in rows[1:]}


def test_scores_are_those_of_the_written_pictures(place, tmp_path):
    """In a process of its own, as a user runs it."""
    result = subprocess.run([sys.executable, ROOT / "test.py", "--testset_name", "set", "--device", "cpu",
                             "--result_dir", tmp_path, "--step_number", "3", "--block_size", "8"],
                            cwd=place, capture_output=True, text=True, encoding="utf-8")
    assert result.returncode == 0, result.stderr
    # No bar where stderr is not a terminal.
    assert result.stderr == ("note: tiny is smaller than SSIM's window of 7x7, so that its SSIM and the set's average "
                             "are nan\n")
    lines = result.stdout.splitlines()
    parameters = sum(p.numel() for p in IDM.from_pretrained(place / "weight" / "compact").parameters())
    assert lines[0] == f"{Path('weight/compact')}: {parameters:,} parameters, T = 1, on cpu in fp32"
    assert "T = 1" in lines[1]
    assert "--step_number 3" in lines[1]
    scores = read_scores(tmp_path / "set" / "10")
    assert list(scores) == sorted(SIZES)
    for number, (name, (psnr, ssim, seconds)) in enumerate(scores.items(), start=1):
        assert lines[number + 1] == (f"[{number:02d}/03] set/{name}  PSNR: {psnr:.2f} dB  SSIM: {ssim:.4f}  "
                                     f"{seconds:.2f} s")
        (path,) = (tmp_path / "set" / "10").glob(f"{name}_*")
        assert path.name == f"{name}_PSNR_{psnr:.2f}_SSIM_{ssim:.4f}.png"
        written, original = (cv2.imdecode(np.fromfile(p, np.uint8), cv2.IMREAD_UNCHANGED)
                             for p in (path, place / "data" / "set" / f"{name}.png"))
        assert written.shape == original.shape
        assert cv2.PSNR(written, original) == pytest.approx(psnr, abs=0.02)  # rounding to whole levels
        if name == "tiny":
            assert math.isnan(ssim)
        else:
            assert structural_similarity(written, original, data_range=255) == pytest.approx(ssim, abs=2e-3)
    average = np.mean([psnr for psnr, _, _ in scores.values()])
    assert f"Average PSNR: {average:.2f} dB" in lines[5]
    assert "3 pictures" in lines[5]


def torchrun(place: Path, *flags: str) -> subprocess.CompletedProcess:
    """test.py on two processes."""
    return subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port",
                           str(free_port()), ROOT / "test.py", "--device", "cpu", "--block_size", "8", *flags],
                          cwd=place, capture_output=True, text=True, encoding="utf-8",
                          env=os.environ | {"OMP_NUM_THREADS": "1"})


def test_two_processes_print_and_write_what_one_does(place, tmp_path):
    flags = ("--testset_name", "set/other", "--batch_size", "2", "--step_number", "1")
    two = torchrun(place, *flags, "--result_dir", str(tmp_path / "two"))
    assert two.returncode == 0, two.stderr
    one = subprocess.run([sys.executable, ROOT / "test.py", "--device", "cpu", "--block_size", "8", *flags,
                          "--result_dir", tmp_path / "one"], cwd=place, capture_output=True, text=True,
                         encoding="utf-8", env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert one.returncode == 0, one.stderr
    lines = [[re.sub(r"[0-9.]+ s\b|/ [0-9.]+$", "", line) for line in run.stdout.splitlines()] for run in (one, two)]
    assert lines[1][0] == f"{lines[0][0]}, 2 processes"
    # Of one process, pictures are in the order of their batches; of two, in their own.
    assert sorted(re.sub(r"^.\d+/", "", line) for line in lines[0][1:]) == \
           sorted(re.sub(r"^.\d+/", "", line) for line in lines[1][1:])
    for name in ("set", "other"):
        a, b = (read_scores(tmp_path / run / name / "10") for run in ("one", "two"))
        assert {key: repr(row[:2]) for key, row in a.items()} == {key: repr(row[:2]) for key, row in b.items()}
        files = [{path.name: path.read_bytes() for path in (tmp_path / run / name / "10").glob("*.png")}
                 for run in ("one", "two")]
        assert files[0] == files[1] and len(files[0]) == len(a)


def test_a_mistake_of_one_process_ends_both(place, tmp_path):
    """The process that cannot write the picture is not left waiting for the other, nor the other for it."""
    blocked = tmp_path / "set" / "10"
    blocked.mkdir(parents=True)
    (blocked / "scores.csv").write_text("of a former run")
    (blocked / "grey_PSNR_1.00_SSIM_0.1000.png").mkdir()  # a former result that cannot be removed
    result = torchrun(place, "--testset_name", "set", "--result_dir", str(tmp_path))
    assert result.returncode != 0
    assert "error: cannot remove a former result" in result.stderr
    assert not (blocked / "scores.csv").exists()


def test_auto_precision_says_what_it_picked(place, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(speed, "half_precisions", lambda device: [])
    call(monkeypatch, place, "--testset_name", "other", "--block_size", "8", "--result_dir", str(tmp_path),
         "--precision", "auto")
    assert "\nprecision fp32, since cpu has no instructions for less\n" in capsys.readouterr().out


def test_compiled_blocks_score_the_same(place, tmp_path, monkeypatch):
    """Pictures of three sizes; traced, but not compiled, which would take minutes."""
    monkeypatch.setattr(speed, "BACKEND", "eager")
    for run_, flags in (("eager", ()), ("compiled", ("--compile",))):
        call(monkeypatch, place, "--testset_name", "set", "--block_size", "8", "--result_dir", str(tmp_path / run_),
             *flags)
    eager, compiled = (read_scores(tmp_path / run_ / "set" / "10") for run_ in ("eager", "compiled"))
    assert {name: row[0] for name, row in compiled.items()} == \
           {name: pytest.approx(row[0], abs=1e-3) for name, row in eager.items()}


def test_self_ensemble_is_announced_and_reconstructs_by_the_mean(place, tmp_path, monkeypatch, capsys):
    call(monkeypatch, place, "--testset_name", "set", "--block_size", "8", "--result_dir", str(tmp_path),
         "--self_ensemble")
    assert "on cpu in fp32, self-ensemble of 8 orientations\n" in capsys.readouterr().out
    net = SelfEnsemble(IDM.from_checkpoint(place / "weight" / "compact"))
    pictures = load_testset("set", place / "data")
    protocol = Protocol(Measurement(settings={"cs_ratio": 0.1, "block_size": 8}))
    expected = {result.name: result.psnr for result in evaluate(net, pictures, protocol)}
    assert {name: row[0] for name, row in read_scores(tmp_path / "set" / "10").items()} == \
           {name: pytest.approx(psnr, abs=1e-4) for name, psnr in expected.items()}
    plain = evaluate(net.net, pictures, protocol)
    assert any(abs(result.psnr - expected[result.name]) > 1e-3 for result in plain)


def test_attention_works_in_windows_where_asked(place, tmp_path, monkeypatch):
    call(monkeypatch, place, "--testset_name", "set", "--block_size", "8", "--result_dir", str(tmp_path),
         "--attention_window", "4")
    net = IDM.from_checkpoint(place / "weight" / "compact")
    pictures = load_testset("set", place / "data")
    protocol = Protocol(Measurement(settings={"cs_ratio": 0.1, "block_size": 8}))
    wide = {result.name: result.psnr for result in evaluate(net, pictures, protocol)}
    net.attention_window = 4
    expected = {result.name: result.psnr for result in evaluate(net, pictures, protocol)}
    found = {name: row[0] for name, row in read_scores(tmp_path / "set" / "10").items()}
    assert found == {name: pytest.approx(psnr, abs=1e-5) for name, psnr in expected.items()}
    assert abs(found["grey"] - wide["grey"]) > 1e-4


class Brightness(Metric):
    """Two toys: of single pictures, and of the set alone."""

    label, unit, digits, higher_is_better = "Light", "cd", 3, False

    def __call__(self, truth, reconstruction):
        return float(truth.mean())


class Pictures(Metric):
    label, digits, higher_is_better = "Count", 1, True

    def __init__(self, device):
        self.count = 0

    def __call__(self, truth, reconstruction):
        self.count += 1

    def of_set(self, scores):
        return self.count


class Dots(LinearOperator):
    """A toy operator: keeps the pixels that a mask of noise lets through."""

    def __init__(self, kept):
        super().__init__()
        self.register_buffer("kept", kept)

    @classmethod
    def random(cls, image_shape: tuple[int, int], generator: torch.Generator, keep: float, rows: int = 1) -> "Dots":
        if not 0 < keep <= 1:
            raise ValueError(f"keep must lie in (0, 1], not {keep}")
        return cls((torch.rand(image_shape, generator=generator) < keep).float())

    def A(self, x):
        return self.kept * x

    def A_adjoint(self, y):
        return self.kept * y

    def measured(self, y):
        return float(self.kept.sum())


def test_an_operator_and_metrics_from_outside_are_evaluated(place, tmp_path, monkeypatch, capsys):
    """Against a network that says what is measured, the scores are those of the picture where it was kept."""
    monkeypatch.setitem(METRICS, "light", Brightness)
    monkeypatch.setitem(METRICS, "count", Pictures)
    monkeypatch.setitem(OPERATORS, "dots", Dots)
    monkeypatch.setattr(IDM, "forward", lambda self, y, operator: operator.A_adjoint(y))
    call(monkeypatch, place, "--testset_name", "set/other", "--operator", "dots", "--operator_settings", "keep=0.5",
         "--metrics", "Light/count", "--result_dir", str(tmp_path))
    folder = tmp_path / "set" / "dots_keep_0.5"
    with open(folder / "scores.csv", newline="", encoding="utf-8") as file:
        rows = {row["name"]: row for row in csv.DictReader(file)}
    assert list(rows) == sorted(SIZES) and list(rows["grey"]) == ["name", "psnr", "ssim", "seconds", "light"]
    lights = []
    for name, row in rows.items():
        pixels = cv2.imdecode(np.fromfile(place / "data" / "set" / f"{name}.png", np.uint8), cv2.IMREAD_UNCHANGED)
        kept = torch.rand(pixels.shape, generator=Measurement().generator(f"{name}.png")).numpy() < 0.5
        error = np.mean(np.where(kept, 0, pixels.astype(float)) ** 2)
        assert float(row["psnr"]) == pytest.approx(10 * math.log10(255**2 / error), abs=1e-4)
        assert float(row["light"]) == pytest.approx(pixels.mean())
        lights.append(pixels.mean())
    out = capsys.readouterr().out
    assert "there are no weights for dots_keep_0.5 in weight; these were trained for cs\n" in out
    assert f"Light: {np.mean(lights):.3f} cd  Count: 3.0  " in out and "0.5" in out.split("measurements a pixel")[0]
    head, first, _ = out.rstrip().split("\n\n")[-1].splitlines()
    assert head.startswith("PSNR (dB) ↑ / SSIM ↑ / Light (cd) ↓ / Count ↑ / seconds an image  dots keep=0.5")
    assert f" / {np.mean(lights):.3f} / 3.0 / " in first


def test_nothing_heavy_is_imported_unless_asked():
    heavy = ["torchmetrics", "torchvision", "torch_fidelity", "lpips", "tensorboard", "matplotlib", "triton",
             "diffusers", "transformers", "huggingface_hub", "scipy"]  # the first three come with the network
    code = f"""
import sys, runpy
sys.argv = ["test.py", "--help"]
try:
    runpy.run_path({str(ROOT / "test.py")!r}, run_name="__main__")
except SystemExit:
    pass
print([name for name in {heavy} if name in sys.modules])
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.stdout.splitlines()[-1] == "[]", result.stdout + result.stderr


def test_several_sets_and_ratios_end_with_a_table(place, tmp_path, monkeypatch, capsys):
    stale = tmp_path / "other" / "2.5" / "twin.png_PSNR_1.00_SSIM_0.1000.png"
    stale.parent.mkdir(parents=True)
    stale.write_bytes(b"of a former run")
    call(monkeypatch, place, "--testset_name", "set/other", "--cs_ratio", "0.025,0.5", "--block_size", "8",
         "--result_dir", str(tmp_path))
    table = capsys.readouterr().out.split("\n\n")[-1].splitlines()  # one file served both ratios, so nothing is below
    assert re.split("  +", table[0])[1:] == ["2.5 %", "50 %"]
    for line, name in zip(table[1:], ("set", "other"), strict=True):
        cells = re.split("  +", line)
        assert cells[0] == name
        for cell, percent in zip(cells[1:], ("2.5", "50"), strict=True):
            psnr, ssim, _ = np.mean(list(read_scores(tmp_path / name / percent).values()), axis=0)
            assert cell.startswith(f"{psnr:.2f} / {ssim:.4f} / ")
    twins = sorted((tmp_path / "other" / "2.5").glob("twin*"))
    assert [path.name.split("_")[0] for path in twins] == ["twin.bmp", "twin.png"]
    assert stale not in twins
    original, written = (cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2YCrCb).astype(int)
                         for path in (place / "data" / "other" / "twin.png", twins[1]))
    inside = (written[..., 0] > 60) & (written[..., 0] < 195)  # elsewhere the colours may leave RGB's cube
    assert np.abs(written - original)[inside][:, 1:].max() <= 1


def test_a_run_cut_short_is_not_mixed_with_a_former_one(place, tmp_path, monkeypatch):
    flags = ("--testset_name", "set", "--block_size", "8", "--result_dir", str(tmp_path))
    call(monkeypatch, place, *flags)
    folder = tmp_path / "set" / "10"
    assert len(list(folder.glob("*.png"))) == 3
    write, written = script.write_reconstruction, []

    def write_one(path, *picture):
        if written:
            raise KeyboardInterrupt
        write(path, *picture)
        written.append(path)

    monkeypatch.setattr(script, "write_reconstruction", write_one)
    with pytest.raises(SystemExit):
        call(monkeypatch, place, *flags, "--seed", "7")
    assert list(folder.glob("*.png")) == written and not (folder / "scores.csv").exists()


def test_a_folder_that_another_process_writes_into_is_left_alone(place, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(files, "PATIENCE", 0.2)
    flags = ("--testset_name", "set", "--block_size", "8", "--result_dir", str(tmp_path))
    folder = tmp_path / "set" / "10"
    folder.mkdir(parents=True)
    (folder / "grey_PSNR_1.00_SSIM_0.1000.png").write_bytes(b"of the other process")
    with held_by_another_process(folder):
        with pytest.raises(SystemExit) as ended:
            call(monkeypatch, place, *flags)
        assert ended.value.code == 2
        assert f"another process is writing into {folder}; choose another --result_dir" in capsys.readouterr().err
        assert [path.read_bytes() for path in folder.glob("*.png")] == [b"of the other process"]
    call(monkeypatch, place, *flags)
    assert len(read_scores(folder)) == len(list(folder.glob("*.png"))) == 3


def test_links_to_weights_that_are_not_there_are_not_passed_over(place, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "weight" / "R_0.10_T_3_B_32"
    folder.mkdir(parents=True)
    for name in ("pretrained", "net_params_50.pkl"):
        (folder / name).symlink_to(tmp_path / "unmounted")
        with pytest.raises(SystemExit) as ended:
            call(monkeypatch, place, "--testset_name", "set", "--model_dir", str(tmp_path / "weight"))
        assert ended.value.code == 2
        assert capsys.readouterr().err == f"error: there is no weight file {folder / name}\n"


def test_published_weights_come_first_and_reconstruct_the_same(place, tmp_path, monkeypatch, capsys):
    flags = ("--testset_name", "other", "--step_number", "1", "--block_size", "8")
    call(monkeypatch, place, *flags, "--result_dir", str(tmp_path / "a"), "--model_dir", "published")
    assert capsys.readouterr().out.startswith(str(Path("published/R_0.10_T_1_B_8/net_params_50.pkl")))
    call(monkeypatch, place, *flags, "--result_dir", str(tmp_path / "b"), "--weights", "weight/compact")
    assert capsys.readouterr().out.startswith(str(Path("weight/compact")))
    a, b = (read_scores(tmp_path / run / "other" / "10") for run in "ab")
    assert {name: row[:2] for name, row in a.items()} == {name: row[:2] for name, row in b.items()}


def test_a_table_of_different_weights_says_which(place, tmp_path, monkeypatch, capsys):
    """Ratios take the published file, the folder that train.py leaves, or the compact weights, but never another's."""
    models = tmp_path / "weight"
    shutil.copytree(place / "published" / "R_0.10_T_1_B_8", models / "R_0.10_T_1_B_8")
    shutil.copytree(place / "weight" / "compact", models / "R_0.30_T_1_B_8" / "pretrained")
    shutil.copytree(place / "weight" / "compact", models / "compact")
    call(monkeypatch, place, "--testset_name", "other", "--cs_ratio", "0.1/0.104/0.3", "--block_size", "8",
         "--step_number", "1", "--model_dir", str(models), "--result_dir", str(tmp_path / "result"))
    assert capsys.readouterr().out.splitlines()[-3:] == [
        f"10 %: {models / 'R_0.10_T_1_B_8' / 'net_params_50.pkl'}",
        f"10.4 %: {models / 'compact'}",
        f"30 %: {models / 'R_0.30_T_1_B_8' / 'pretrained'}"]


def test_weights_of_other_steps_are_noted(place):
    path = place / "weight" / "compact"
    net = IDM.from_checkpoint(path)  # of T = 1
    assert WeightFlags(step_number=3).notes(path, net, Measurement()) == [
        "these weights are for T = 1; --step_number 3 does not apply"]
    for flags in WeightFlags(), WeightFlags(step_number=1):
        assert flags.notes(path, net, Measurement()) == []


def test_the_weights_that_come_along_are_those_trained_for_the_most_alike(tmp_path):
    for name in ("compact", "operators", "noisy"):
        (tmp_path / name).mkdir()
    flags = WeightFlags(model_dir=tmp_path)
    for measurement, name in ((Measurement(), "compact"), (Measurement(noise=(0.0, 0.05)), "noisy"),
                              (Measurement("inpainting", {}), "operators"), (Measurement("deblurring", {}), "compact"),
                              (Measurement("ct", {}, noise=(0.1, 0.1)), "operators")):
        assert flags.find(measurement) == tmp_path / name
    (tmp_path / "operators").rmdir()
    assert flags.find(Measurement("mri", {})) == tmp_path / "compact"


@torch.no_grad()
def test_fewer_steps_than_those_of_named_weights_shorten_the_chain(tmp_path):
    torch.manual_seed(0)
    IDM.compact(width=32, num_steps=3).save_pretrained(tmp_path)
    picture = torch.rand(1, 1, 32, 32)
    operator = Measurement().draw((32, 32), torch.Generator().manual_seed(0))
    y = operator.A(picture)
    full = IDM.from_pretrained(tmp_path).eval()
    seen = []
    for steps in (None, 3, 2, 1):
        flags = WeightFlags(tmp_path, step_number=steps)
        net = flags.load(tmp_path, torch.device("cpu"))
        seen.append(net(y, operator))
        assert torch.allclose(seen[-1], full(y, operator, steps=steps), atol=1e-6)
        assert [f"the last {steps} are taken" in line for line in flags.notes(tmp_path, net, Measurement())] == (
            [True] if steps in (1, 2) else [])
    assert torch.equal(seen[0], seen[1])
    assert not torch.allclose(seen[1], seen[2], atol=1e-4) and not torch.allclose(seen[2], seen[3], atol=1e-4)
    found = WeightFlags(step_number=2, model_dir=tmp_path)  # not named: taken as they are
    assert found.load(tmp_path, torch.device("cpu")).default_steps is None


@pytest.mark.parametrize("flags, message", [
    (["--cs_ratio", "0"], "(0, 1], not 0"),
    (["--cs_ratio", "0.1/1.5"], "(0, 1], not 1.5"),
    (["--cs_ratio", "nan"], "(0, 1], not nan"),
    (["--cs_ratio", "ten"], "not ten"),
    (["--cs_ratio", "0.1//0.3"], "not 0.1//0.3"),
    (["--block_size", "0"], "at least 1, not 0"),
    (["--block_size", "1000000000000"], "at most 1024, not 1000000000000"),
    (["--result_dir", ""], "--result_dir: must not be empty; the current folder is ."),
    (["--testset_name", 300 * "x"], "(File name too long)"),
    (["--step_number", "-1"], "at least 1, not -1"),
    (["--epoch", "last"], "not last"),
    (["--precision", "fp8"], "fp8"),
    (["--batch_size", "0"], "at least 1, not 0"),
    (["--metrics", "psmr"], "not psmr"),
    (["--operator", "lens"], "invalid choice: 'lens'"),
    (["--operator_settings", "cs_ratio=0.3", "--cs_ratio", "0.3"], "cs_ratio is given twice"),
    (["--operator_settings", "size=3"], "takes no size=3; its settings are cs_ratio, block_size"),
    (["--operator", "mri", "--operator_settings", "complex_images=true"],
     "measures images of 2 channels, but pictures are measured in one, their luminance"),
    (["--operator", "deblurring", "--operator_settings", "kernel=data/even.npy"], "must have odd sides"),
    (["--operator", "inpainting", "--operator_settings", "mask=data/mask.png"], "mask.png is 3x3, but the images are"),
    (["--operator", "ct", "--operator_settings", "angles=0"], "angles must be at least 1, not 0"),
    (["--weights", "channels"], "channels is for images of 2 channels, but pictures are measured in one"),
    (["--noise", "loud"], "a standard deviation, or a range as 0-0.05, not loud"),
    (["--metrics", "lpips"], "alexnet-owt-7be5be79.pth"),
    (["--metrics", "fid"], "weights-inception-2015-12-05-6726825d.pth"),
    (["--no_such_flag"], "--no_such_flag"),
    (["--device", "cuda:99"], "--device cuda:99"),
    (["--device", "abacus"], "--device abacus"),
    (["--device", "meta"], "--device meta"),
    (["--testset_name", "absent"], "absent: a test set is a folder of pictures in data, which has "),
    (["--testset_name", "nested"], "nested holds no picture itself; for those below it use --data_dir data/nested"),
    (["--testset_name", "absent/"], "absent: a test set"),
    (["--model_dir", "mistyped"], "mistyped/compact"),
    (["--testset_name", ".."], ".."),
    (["--testset_name", "Urban100"], "Huang"),
    (["--testset_name", "empty"], "no picture"),
    (["--testset_name", "broken"], "cut.png"),
    (["--data_dir", "nowhere"], "nowhere"),
    (["--weights", "nowhere.pkl"], "nowhere.pkl"),
    (["--weights", "data/broken/cut.png"], "cut.png"),
    (["--weights", "data"], "data"),
    (["--model_dir", "published", "--step_number", "1", "--block_size", "8", "--epoch", "40"], "net_params_50.pkl"),
    (["--result_dir", "data/set/grey.png"], "grey.png"),
])
def test_mistakes_end_with_one_sentence(place, monkeypatch, capfd, flags, message):
    monkeypatch.setenv("TORCH_HOME", str(place / "nowhere"))
    (place / "data" / "empty").mkdir(exist_ok=True)
    (place / "data" / "nested" / "one").mkdir(parents=True, exist_ok=True)
    shutil.copy(place / "data" / "set" / "tiny.png", place / "data" / "nested" / "one")
    (place / "data" / "broken").mkdir(exist_ok=True)
    (place / "data" / "broken" / "cut.png").write_bytes((place / "data" / "set" / "grey.png").read_bytes()[:-100])
    cv2.imwrite(str(place / "data" / "mask.png"), np.full((3, 3), 255, np.uint8))
    np.save(place / "data" / "even.npy", np.ones((4, 4)))
    if "channels" in flags:
        IDM((32, 64), 1, in_channels=2).save_pretrained(place / "channels")
    with pytest.raises(SystemExit) as stop:
        call(monkeypatch, place, "--testset_name", "set", "--result_dir", str(place / "result"), *flags)
    assert stop.value.code == 2
    error = capfd.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error


def test_weights_beside_the_script_serve_elsewhere_unless_another_folder_is_named(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(weights, "BESIDE", place / "weight")
    measurement = Measurement(settings={"cs_ratio": 0.1, "block_size": 8})

    def found(**flags) -> Path:
        return WeightFlags(step_number=1, **flags).find(measurement)

    assert found() == place / "weight" / "compact"
    published = shutil.copytree(place / "published", place / "weight", dirs_exist_ok=True) / "R_0.10_T_1_B_8"
    try:
        assert found() == published / "net_params_50.pkl"
        with pytest.raises(UserError, match="but not net_params_7.pkl"):
            found(epoch=7)
        (tmp_path / "weight").mkdir()
        with pytest.raises(UserError, match="neither mistyped.* nor mistyped"):
            found(model_dir=Path("mistyped"))
    finally:
        shutil.rmtree(published)


def test_what_a_short_training_left_is_taken_without_asking_for_an_epoch(tmp_path):
    """train.py for two epochs leaves net_params_2.pkl and the newest weights in pretrained."""
    run_ = tmp_path / "R_0.10_T_3_B_32"
    (run_ / "pretrained").mkdir(parents=True)
    (run_ / "net_params_2.pkl").touch()
    search = WeightFlags(model_dir=tmp_path)
    assert search.find(Measurement()) == run_ / "pretrained"
    assert search.find(Measurement(noise=(0.05, 0.05))) == run_ / "pretrained"  # there are none for noise
    assert replace(search, epoch=2).find(Measurement()) == run_ / "net_params_2.pkl"
    with pytest.raises(UserError, match="holds net_params_2.pkl, but not net_params_50.pkl; choose an --epoch"):
        replace(search, epoch=50).find(Measurement())


def test_a_runs_folder_or_the_file_in_it_will_do(place, tmp_path):
    shutil.copytree(place / "weight" / "compact", tmp_path / "pretrained")
    file = tmp_path / "pretrained" / "diffusion_pytorch_model.safetensors"
    for path in (tmp_path, file):
        net = weights.load_network(path, torch.device("cpu"))
        assert torch.equal(net.steps[0].v, IDM.from_pretrained(place / "weight" / "compact").steps[0].v)
        assert WeightFlags(path, epoch=7).notes(path, net, Measurement())[-1].endswith("--epoch 7 does not apply")


def test_missing_weights_say_where_they_were_looked_for(place, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(weights, "BESIDE", tmp_path)
    with pytest.raises(SystemExit) as stop:
        call(monkeypatch, place, "--testset_name", "set", "--model_dir", str(tmp_path), "--cs_ratio", "0.3")
    assert stop.value.code == 2
    assert str(tmp_path / "R_0.30_T_3_B_32" / "net_params_50.pkl") in capsys.readouterr().err


def test_names_that_file_systems_or_terminals_do_not_take(place, tmp_path, monkeypatch, capsys):
    """Result pictures of names of up to 255 bytes, told apart; on the terminal nothing that it would obey."""
    names = ["ü" * 125, "a" * 250 + "1", "a" * 250 + "2"]
    (tmp_path / "data" / "long").mkdir(parents=True)
    for number, name in enumerate(names):
        pixels = np.full((8, 8), 50 * number, np.uint8)
        (tmp_path / "data" / "long" / f"{name}.png").write_bytes(cv2.imencode(".png", pixels)[1].tobytes())
    flags = ("--data_dir", str(tmp_path / "data"), "--testset_name", "long", "--block_size", "8", "--result_dir",
             str(tmp_path / "result"))
    for _ in range(2):  # the second run replaces what the first one wrote
        call(monkeypatch, place, *flags)
        folder = tmp_path / "result" / "long" / "10"
        assert sorted(read_scores(folder)) == sorted(names)
        assert len(list(folder.glob("*.png"))) == 3
    assert "ü" * 100 in "".join(path.name for path in folder.iterdir())
    for name in (tmp_path / "data" / "long").iterdir():
        name.unlink()
    (tmp_path / "data" / "long").rename(tmp_path / "data" / "red\x1b[31m\nset")
    cv2.imwrite(str(tmp_path / "data" / "red\x1b[31m\nset" / "a.png"), pixels)
    (tmp_path / "data" / "red\x1b[31m\nset" / "b.\x1b[31m").touch()
    call(monkeypatch, place, *flags, "--testset_name", "red\x1b[31m\nset", "--cs_ratio", "0.1,0.5")
    told = capsys.readouterr()
    assert "\x1b" not in told.out + told.err and "red\\x1b[31m\\nset/10/a  PSNR" in told.out
    assert "1 picture of red\\x1b[31m\\nset at 10 %" in told.out and "not read as pictures: 'b.\\x1b[31m'" in told.err


def test_sets_by_path_single_files_and_what_is_not_read(place, tmp_path, monkeypatch, capsys):
    """A set below a folder of sets, a set elsewhere, one picture; kinds that OpenCV reads are read, others named."""
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32), dtype=np.uint8)
    (tmp_path / "data" / "Classic" / "Set2" / "more").mkdir(parents=True)
    folder = tmp_path / "data" / "Classic" / "Set2"
    for suffix in (".webp", ".jp2", ".pgm"):
        (folder / f"in{suffix}").write_bytes(cv2.imencode(suffix, pixels)[1].tobytes())
    (folder / "photo.jfif").write_bytes(cv2.imencode(".jpg", pixels)[1].tobytes())
    (folder / "more" / "a.png").write_bytes(cv2.imencode(".png", pixels)[1].tobytes())
    (folder / "b.heic").touch()
    for data, testset, name, count in ((tmp_path / "data", "Classic/Set2", "Classic/Set2", 4),
                                       ("data", str(folder), "Set2", 4), ("data", f"{folder}/in.pgm", "in", 1)):
        call(monkeypatch, place, "--data_dir", str(data), "--testset_name", testset, "--block_size", "8",
             "--result_dir", str(tmp_path / "result"))
        assert len(read_scores(tmp_path / "result" / name / "10")) == count
        note = f"note: of {testset}, not read as pictures: b.heic, more{os.sep}\n"
        assert capsys.readouterr().err == (note if count == 4 else "")


def test_a_home_behind_an_equals_sign_is_found(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["test.py", "--result_dir=~/x", "--data_dir=~"])
    args = script.parse_arguments()
    assert (args.result_dir, args.data_dir) == (tmp_path / "x", tmp_path)
    assert result_name("~/sets/Set11") == "Set11"


def test_noise_and_ratios_name_folders(place, tmp_path, monkeypatch, capsys):
    call(monkeypatch, place, "--testset_name", "other", "--block_size", "8", "--noise", "0.05", "--cs_ratio", "0.1,0.5",
         "--result_dir", str(tmp_path))
    clean = tmp_path / "clean"
    call(monkeypatch, place, "--testset_name", "other", "--block_size", "8", "--result_dir", str(clean))
    assert sorted(path.name for path in (tmp_path / "other").iterdir()) == ["10_noise_0.05", "50_noise_0.05"]
    noisy, quiet = read_scores(tmp_path / "other" / "10_noise_0.05"), read_scores(clean / "other" / "10")
    assert all(noisy[name][0] != quiet[name][0] for name in quiet)
    assert "10 %, noise 0.05" in capsys.readouterr().out
