"""The command line train.py from end to end, on crops of a few shipped pictures, and the mistakes a user can make."""
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import cv2
import pytest
import skimage
import torch

import train
from model import IDM
from utils.errors import run

ROOT = Path(__file__).resolve().parents[1]
NAME = "R_0.10-0.50_T_2_B_16"
FLAGS = ["--base_model", "compact", "--width", "32", "--shuffle", "4", "--step_number", "2", "--cs_ratio", "0.5,0.1",
         "--block_size", "16", "--patch_size", "32", "--batch_size", "2", "--epoch", "2", "--iters_per_epoch", "2",
         "--device", "cpu", "--testset_name", "Tiny"]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A data folder with pristine_images, and a test set of one small picture."""
    data = tmp_path_factory.mktemp("data")
    (data / "pristine_images" / "more").mkdir(parents=True)
    (data / "Tiny").mkdir()
    shipped = Path(skimage.__file__).parent / "data"
    for name, place in [("astronaut", "pristine_images"), ("coffee", "pristine_images/more"), ("camera", "Tiny")]:
        picture = cv2.imread(str(shipped / f"{name}.png"))[100:140, 200:250]
        cv2.imwrite(str(data / place / f"{name}.png"), picture)
    return data


def flags(data: Path, place: Path, *more: str) -> list[str]:
    return [*FLAGS, "--data_dir", str(data), "--model_dir", str(place / "weight"), "--log_dir", str(place / "log"),
            *more]


def start(*arguments: str, launcher: tuple[str, ...] = ()) -> str:
    """Run train.py as a process of its own; what it prints."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, *launcher, str(ROOT / "train.py"), *arguments], env=environment,
                            capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return result.stdout


def weights(place: Path, epoch: int = 2) -> dict[str, torch.Tensor]:
    return torch.load(place / "weight" / NAME / f"net_params_{epoch}.pkl", weights_only=True)


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory) -> tuple[Path, str]:
    """An uninterrupted run: its place, and what it printed."""
    place = tmp_path_factory.mktemp("whole")
    return place, start(*flags(data, place))


def test_a_run_leaves_checkpoints_that_load_and_a_log(whole):
    place, printed = whole
    log = (place / "log" / f"{NAME}.txt").read_text().splitlines()
    assert [line.split()[0] for line in log] == ["[01/2]"] * 3 + ["[02/2]"] * 3
    assert log[0].startswith("[01/2] loss: 0.") and "lr: 1.0e-04" in log[0]
    assert all("Tiny, ratio 0." in line and "PSNR" in line for line in log[1:3])
    assert set(log) <= set(printed.splitlines())
    folder = place / "weight" / NAME
    assert sorted(file.name for file in folder.iterdir()) == ["net_params_2.pkl", "pretrained", "state.pt"]
    published = IDM.from_checkpoint(folder / "net_params_2.pkl")
    own = IDM.from_checkpoint(folder / "pretrained")
    assert same(own.state_dict(), published.state_dict())
    torch.manual_seed(2025)
    fresh = IDM.compact(width=32, num_steps=2, shuffle=4)
    moved = [name for name, tensor in own.state_dict().items() if not torch.equal(tensor, fresh.state_dict()[name])]
    assert len(moved) == len(fresh.state_dict())
    # Four steps of Adam at 1e-4 move no number by more than 4e-4 and a little.
    assert max(float((own.state_dict()[name] - fresh.state_dict()[name]).abs().max()) for name in moved) < 6e-4


def test_a_resumed_run_ends_with_the_very_weights_of_an_uninterrupted_one(whole, data, tmp_path):
    start(*flags(data, tmp_path, "--max_iters", "3"))
    assert not same(weights(tmp_path), weights(whole[0]))
    printed = start(*flags(data, tmp_path, "--resume", "--num_workers", "1"))
    assert "from iteration 3" in printed
    assert same(weights(tmp_path), weights(whole[0]))
    resumed, uninterrupted = ((place / "log" / f"{NAME}.txt").read_text().splitlines()[-3:]
                              for place in (tmp_path, whole[0]))
    assert resumed[0].split(", ")[0] == uninterrupted[0].split(", ")[0]  # the loss over both halves of the epoch
    assert resumed[1:] == uninterrupted[1:]  # the scores


def test_two_processes_train_one_model(whole, data, tmp_path):
    printed = start(*flags(data, tmp_path), launcher=("-m", "torch.distributed.run", "--standalone", "--nproc_per_node",
                                                      "2"))
    assert printed.count("[02/2] loss") == 1
    assert not same(weights(tmp_path), weights(whole[0]))
    state = torch.load(tmp_path / "weight" / NAME / "state.pt", weights_only=True)
    assert state["configuration"]["processes"] == 2 and len(state["random"]) == 2


@pytest.fixture
def call(monkeypatch, data, tmp_path):
    """Run train.py in this process, in a place of its own."""
    def call(*more: str, place: Path = tmp_path) -> None:
        monkeypatch.setattr(sys, "argv", ["train.py", *flags(data, place, *more)])
        run(train.main, train.WeightsError)
    return call


def read_state(place: Path) -> dict:
    return torch.load(place / "weight" / NAME / "state.pt", weights_only=True)


def test_a_signal_saves_the_state_and_ends_the_run(call, monkeypatch, tmp_path, capsys):
    backward = train.backward

    def signalled(run, *arguments):
        if run.progress.iteration == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return backward(run, *arguments)

    monkeypatch.setattr(train, "backward", signalled)
    call("--iters_per_epoch", "9")
    assert read_state(tmp_path)["progress"]["iteration"] == 3
    assert "stopped by a signal after iteration 3" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_signal_in_the_last_iteration_lets_the_run_end(call, monkeypatch, tmp_path, capsys):
    backward = train.backward

    def signalled(*arguments):
        os.kill(os.getpid(), signal.SIGINT)
        return backward(*arguments)

    monkeypatch.setattr(train, "backward", signalled)
    call("--max_iters", "1")
    assert read_state(tmp_path)["progress"]["iteration"] == 1 and weights(tmp_path, epoch=1)
    call("--max_iters", "1", "--resume")
    assert capsys.readouterr().out.endswith("nothing is left to do\n")


def test_losses_that_are_not_finite_are_skipped_and_counted(call, monkeypatch, tmp_path, capsys):
    backward = train.backward

    def sometimes_broken(run, *arguments):
        loss = backward(run, *arguments)
        return loss * math.nan if run.progress.iteration == 1 else loss

    before_and_after = []
    update = train.update

    def watched(run, loss, finite):
        before = {name: tensor.clone() for name, tensor in run.net.state_dict().items()}
        update(run, loss, finite)
        before_and_after.append((finite, same(before, run.net.state_dict())))

    monkeypatch.setattr(train, "backward", sometimes_broken)
    monkeypatch.setattr(train, "update", watched)
    call("--max_iters", "3", "--testset_name", "nothing")
    assert before_and_after == [(True, False), (False, True), (True, False)]
    progress = read_state(tmp_path)["progress"]
    assert (progress["skipped"], progress["skipped_in_a_row"]) == (1, 0)
    printed = capsys.readouterr().out
    assert "1 iterations skipped so far" in printed and "note: no test after each epoch" in printed


def test_a_run_without_finite_losses_ends_and_keeps_its_state(call, monkeypatch, tmp_path, capsys):
    backward = train.backward

    def broken(run, *arguments):
        return backward(run, *arguments) if run.progress.iteration < 2 else torch.tensor(math.inf)

    monkeypatch.setattr(train, "backward", broken)
    with pytest.raises(SystemExit) as ended:
        call("--epoch", "20")
    assert "no finite loss or gradient in 10 iterations in a row, up to iteration 12" in ended.value.code
    assert read_state(tmp_path)["progress"]["iteration"] == 10  # of the last whole epoch
    assert "[05/20] loss: nan" in capsys.readouterr().out


@pytest.mark.parametrize(("more", "sentence"), [
    (["--patch_size", "40"], "--patch_size must be a multiple of 16 here, not 40"),
    (["--patch_size", "27", "--block_size", "3"], "--patch_size must be a multiple of 24 here, not 27"),
    (["--cs_ratio", "1.5"], "--cs_ratio must lie in (0, 1]"),
    (["--cs_ratio", "ten"], "--cs_ratio ten is no list of numbers"),
    (["--batch_size", "0"], "--batch_size must be above 0, not 0"),
    (["--train_dir", "nowhere"], "there is no folder nowhere"),
    (["--patch_size", "512"], "none of the 2 pictures"),
    (["--width", "30"], "--width 30"),
    (["--base_model", "nowhere.pkl"], "nowhere.pkl"),
    (["--device", "toaster"], "--device toaster"),
])
def test_a_users_mistake_is_one_sentence_and_status_2(call, capsys, more, sentence):
    with pytest.raises(SystemExit) as ended:
        call(*more)
    printed = capsys.readouterr()
    assert ended.value.code == 2
    assert printed.err.startswith("error: ") and printed.err.count("\n") == 1 and sentence in printed.err


def test_an_earlier_run_is_neither_overwritten_nor_continued_with_other_settings(call, whole, capsys):
    for more, sentence in [
        ([], "holds an earlier run; add --resume"),
        (["--resume", "--batch_size", "4", "--invertible", "none"],
         "batch_size was 2, is 4; invertible was both, is none"),
    ]:
        with pytest.raises(SystemExit) as ended:
            call(*more, place=whole[0])
        assert ended.value.code == 2 and sentence in capsys.readouterr().err


def test_published_checkpoints_in_the_runs_folder_are_not_overwritten(call, tmp_path, capsys):
    folder = tmp_path / "weight" / NAME
    folder.mkdir(parents=True)
    (folder / "net_params_50.pkl").write_bytes(b"published")
    for more in ([], ["--resume"]):
        with pytest.raises(SystemExit):
            call(*more)
        assert "it left no state to resume from" in capsys.readouterr().err
    assert (folder / "net_params_50.pkl").read_bytes() == b"published"


def test_training_can_start_from_a_checkpoint(whole, data, tmp_path, monkeypatch):
    for source in ("net_params_2.pkl", "pretrained"):
        source = str(whole[0] / "weight" / NAME / source)
        monkeypatch.setattr(sys, "argv", ["train.py", *flags(data, tmp_path, "--base_model", source)])
        args = train.parse_args("")
        net = train.build_network(args, train.distributed.start("cpu"))
        assert same(net.official_state_dict(), weights(whole[0]))
        args.step_number = 3
        with pytest.raises(train.UserError, match="use --step_number 2"):
            train.build_network(args, train.distributed.start("cpu"))


def test_learning_rates_are_the_published_ones_or_a_cosine(monkeypatch, data, tmp_path):
    monkeypatch.setattr(sys, "argv", ["train.py"])
    args = train.parse_args("")
    assert (args.epoch, args.learning_rate, args.batch_size, args.patch_size) == (50, 1e-4, 8, 256)
    assert train.run_name(args) == "R_0.10_T_3_B_32"
    rates = [train.learning_rate(args, epoch * 1000) for epoch in range(50)]
    assert rates == [1e-4 * 0.5**(epoch // 10) for epoch in range(50)]
    assert train.learning_rate(args, 9_999) == 1e-4
    args.lr_schedule = "cosine"  # 50,000 iterations, the first 1,000 of them to warm up
    assert train.learning_rate(args, 0) == pytest.approx(1e-7)
    assert train.learning_rate(args, 999) == pytest.approx(1e-4)
    assert train.learning_rate(args, 25_500) == pytest.approx(5e-5)
    assert 0 < train.learning_rate(args, 49_999) < 1e-9
