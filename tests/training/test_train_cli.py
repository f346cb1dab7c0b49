"""The command line train.py from end to end, on crops of a few shipped pictures, and the mistakes a user can make."""
import json
import math
import os
import re
import shutil
import signal
import sys
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import cv2
import pytest
import skimage
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2

import train
from model import IDM, BlockCompressedSensing
from model.operators import random_sampling_matrix
from tests.test_files import held_by_another_process
from utils import files
from utils.data.crops import TrainingCrops
from utils.distributed import Process, Pulse, seed_of
from utils.errors import UserError, run
from utils.training import loop, report, start
from utils.training.settings import Settings
from utils.training.state import TrainingState, list_states, load_newest_state

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


def call_train(place: Path, data: Path, *more: str) -> None:
    """Run train.py in this process, in a place of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py", *flags(data, place, *more)])
        run(train.main)


def weights(place: Path) -> dict[str, torch.Tensor]:
    return IDM.from_pretrained(place / "weight" / NAME / "pretrained").state_dict()


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory) -> Path:
    """The place of an uninterrupted run."""
    place = tmp_path_factory.mktemp("whole")
    call_train(place, data)
    return place


@pytest.fixture
def call(data, tmp_path) -> Callable[..., None]:
    def call(*more: str, place: Path = tmp_path) -> None:
        call_train(place, data, *more)
    return call


def read_state(place: Path) -> TrainingState:
    return load_newest_state(place / "weight" / NAME)[0]


def test_a_run_leaves_checkpoints_that_load_and_a_log(whole):
    log = (whole / "log" / f"{NAME}.txt").read_text().splitlines()
    assert [line.split()[0] for line in log] == ["[01/2]"] * 3 + ["[02/2]"] * 3
    assert log[0].startswith("[01/2] loss: 0.") and "lr: 1.0e-04" in log[0]
    assert all("Tiny, ratio 0." in line and "PSNR" in line for line in log[1:3])
    folder = whole / "weight" / NAME
    assert sorted(file.name for file in folder.iterdir()) == [  # of 1 head, so no .pkl
        ".lock", "pretrained", "state_00000002.pt", "state_00000004.pt"]
    own = IDM.from_checkpoint(folder / "pretrained")
    torch.manual_seed(2025)
    fresh = IDM.compact(width=32, num_steps=2, shuffle=4)
    moved = [name for name, tensor in own.state_dict().items() if not torch.equal(tensor, fresh.state_dict()[name])]
    assert set(fresh.state_dict()) - set(moved) == {"log_damping"}  # which only noise moves
    # Four steps of Adam at 1e-4 move no number by more than 4e-4 and a little.
    assert max(float((own.state_dict()[name] - fresh.state_dict()[name]).abs().max()) for name in moved) < 6e-4


def test_a_resumed_run_ends_with_the_very_weights_of_an_uninterrupted_one(whole, call, tmp_path, capsys):
    call("--max_iters", "3", "--invertible", "both")
    assert not same(weights(tmp_path), weights(whole))
    call("--num_workers", "1")
    assert "from iteration 3" in capsys.readouterr().out
    assert same(weights(tmp_path), weights(whole))
    resumed, uninterrupted = (
        [line.split(", ") for line in (place / "log" / f"{NAME}.txt").read_text().splitlines()[-3:]]
        for place in (tmp_path, whole))
    assert resumed[0][0] == uninterrupted[0][0]  # the loss over both halves of the epoch
    assert [line[:-1] for line in resumed[1:]] == [line[:-1] for line in uninterrupted[1:]]  # the scores, but the time


def plain_steps(state: dict, data: Path, rates: list[float]) -> tuple[dict, dict]:
    """Go on from what torch.load reads of a state, at these learning rates: the weights, and their average."""
    net = IDM(**state["network"])
    net.load_state_dict(state["model"])
    net.invertible = "none"
    optimizer = torch.optim.Adam(net.parameters(), fused=True)
    optimizer.load_state_dict(deepcopy(state["optimizer"]))  # which it changes in place
    average = {name: state["ema"][name] for name, _ in net.named_parameters()}
    matrix = random_sampling_matrix(1.0, 16, torch.Generator().manual_seed(2031))
    pictures = TrainingCrops(data / "pristine_images", 32, 2031)
    first, crops = state["progress"]["iteration"], state["progress"]["crops"]
    for iteration, rate in enumerate(rates, start=first):
        generator = torch.Generator().manual_seed(seed_of(2031, iteration, 0))
        ratio = (0.1, 0.5)[int(torch.randint(2, (), generator=generator))]
        symmetry = int(torch.randint(8, (), generator=generator))
        operator = BlockCompressedSensing(matrix[:, :math.ceil(ratio * 256)], torch.randperm(1024, generator=generator),
                                          (32, 32))
        x = torch.stack([pictures[crops], pictures[crops + 1]]).float() / 255
        x = x.rot90(symmetry % 4, (2, 3))
        x = x.flip(3) if symmetry >= 4 else x
        ((net(operator.A(x), operator) - x)**2).mean((1, 2, 3)).log().mean().backward()
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
        kept, crops = min(0.9, (1 + iteration) / (10 + iteration)), crops + 2
        average = {name: kept * average[name] + (1 - kept) * now.detach() for name, now in net.named_parameters()}
    return net.state_dict(), average


def test_a_run_goes_on_or_decays_from_a_state_as_plain_code_does_with_its_numbers(call, data, tmp_path, capsys):
    """The state is one that was written before there were settings of decay."""
    more = ["--loss", "log_mse", "--lr_schedule", "constant", "--ema", "0.9", "--seed", "2031", "--invertible", "none",
            "--testset_name", "none"]
    call(*more, "--epoch", "1")
    folder = tmp_path / "weight" / NAME
    path, *_ = states = list_states(folder)
    state = torch.load(path)
    del state["configuration"]["decay_from"], state["progress"]["before"]
    torch.save(state, path)
    before = path.read_bytes()
    decay = ["--decay_from", str(folder), "--epoch", "1", "--learning_rate", "3e-4", "--loss", "log_mse", "--ema",
             "0.9", "--seed", "2031", "--invertible", "none", "--testset_name", "none"]
    call(*decay, "--max_iters", "1", place=tmp_path / "decay")
    call(*decay, place=tmp_path / "decay")
    assert f"T = 2, from {folder} after 2 iterations" in capsys.readouterr().out
    assert path.read_bytes() == before and list_states(folder) == states
    call(*more)
    for place, rates in ((tmp_path / "decay", [3e-4, 1.5e-4]), (tmp_path, [1e-4, 1e-4])):
        expected, average = plain_steps(state, data, rates)
        found = read_state(place)
        assert all(torch.allclose(found.model[name], expected[name], atol=1e-7) for name in expected)
        assert all(torch.allclose(found.ema[name], average[name], atol=1e-7) for name in average)
    for flag, sentence in (("nowhere", "nowhere is not a whole training state"),
                           (str(data), f"--decay_from {data} holds no training state; name a run's folder")):
        with pytest.raises(SystemExit):
            call("--decay_from", flag, place=tmp_path / "other")
        assert sentence in capsys.readouterr().err


def before_steps(monkeypatch, act: Callable) -> None:
    """Have `act` called with the run before each iteration."""
    train_step = train.train_step

    def step(run, batches):
        act(run)
        return train_step(run, batches)

    monkeypatch.setattr(train, "train_step", step)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGUSR1"])  # of a terminal that closes; of Slurm
def test_a_signal_saves_the_state_and_ends_the_run(call, monkeypatch, tmp_path, capsys, name):
    number = getattr(signal, name)
    before_steps(monkeypatch, lambda run: run.progress.iteration == 2 and os.kill(os.getpid(), number))
    with pytest.raises(SystemExit) as ended:
        call("--iters_per_epoch", "9")
    assert ended.value.code == 130  # so that nothing that waits for the run's end takes this for it
    assert read_state(tmp_path).progress.iteration == 3
    assert "stopped by a signal after iteration 3" in capsys.readouterr().out
    assert signal.getsignal(number) == signal.SIG_DFL


def test_after_a_signal_in_the_last_iteration_only_the_tests_are_left_to_do(call, monkeypatch, tmp_path, capsys):
    before_steps(monkeypatch, lambda run: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(SystemExit):
        call("--max_iters", "1")
    assert read_state(tmp_path).progress.iteration == 1 and weights(tmp_path)
    assert "test skipped" not in capsys.readouterr().out
    call("--max_iters", "1")
    assert len(logged_scores(tmp_path)) == 1
    assert capsys.readouterr().out.splitlines()[-1].startswith("nothing is left to do; ")


def test_a_signal_in_a_test_is_heard_in_the_midst_of_a_picture(call, whole, monkeypatch, tmp_path, capsys):
    """The run then goes on with that test."""
    computed = []

    def signalled(process, net, *arguments, **more):
        net.unet.conv_in.register_forward_hook(lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        net.unet.conv_out.register_forward_hook(lambda *_: computed.append(1))
        return evaluate_spread(process, net, *arguments, **more)

    evaluate_spread = report.evaluate_spread
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(report, "evaluate_spread", signalled)
        call()
    assert ended.value.code == 130 and not computed
    assert "stopped by a signal after iteration 2; the same command goes on" in capsys.readouterr().out
    call()
    assert logged_scores(tmp_path) == logged_scores(whole) and len(logged_scores(whole)) == 2
    assert same(weights(tmp_path), weights(whole))


def test_a_signal_in_a_test_of_compiled_blocks_is_heard_after_a_picture(call, data, monkeypatch, tmp_path):
    shutil.copytree(data / "Tiny", tmp_path / "Twins")
    shutil.copy(data / "Tiny" / "camera.png", tmp_path / "Twins" / "twin.png")
    computed, evaluate_spread = [], report.evaluate_spread

    def signalled(process, net, *arguments, **more):
        net.unet.conv_out.register_forward_hook(lambda *_: computed.append(os.kill(os.getpid(), signal.SIGTERM)))
        return evaluate_spread(process, net, *arguments, **more)

    monkeypatch.setattr(loop, "compile_blocks", lambda *_, **__: None)
    monkeypatch.setattr(report, "evaluate_spread", signalled)
    with pytest.raises(SystemExit):
        call("--compile", "--testset_name", str(tmp_path / "Twins"))
    assert len(computed) == 2  # steps, of the first picture


def logged_scores(place: Path) -> list[dict]:
    """What a run's log says of the tests after each epoch."""
    return [json.loads(line)["tests"] for line in (place / "log" / f"{NAME}.jsonl").read_text().splitlines()]


def test_tensorboard_begins_with_the_loss_and_has_all_v_in_one_chart(whole):
    board = EventAccumulator(str(whole / "log" / NAME))
    board.Reload()
    tags = board.Tags()
    curves = sorted(tags["scalars"], key=str.lower)
    assert curves[0] == "loss" and [event.step for event in board.Scalars("loss")] == [1, 2, 3, 4]
    strip = "back-projection, reconstruction, truth at"
    assert sorted(tags["images"]) == [f"{strip} {ratio}/camera" for ratio in (0.1, 0.5)]
    layout = layout_pb2.Layout()
    layout.ParseFromString(board.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    charts = {chart.title: [tag for tag in curves if re.fullmatch(chart.multiline.tag[0], tag)]
              for category in layout.category for chart in category.chart}
    scalars = [name for name, value in IDM.compact(32, 2, 4).named_parameters() if name.endswith(".v")]
    assert charts["v"] == sorted(f"v/{name.removesuffix('.v')}" for name in scalars) and len(scalars) > 20
    assert charts["alpha"] == ["schedule/alpha 1", "schedule/alpha 2"]


def test_a_run_without_finite_losses_ends_and_keeps_its_state(call, monkeypatch, tmp_path, capsys):
    """All but the fourth iteration are skipped, which leave all as it was."""
    moved = []

    def breaks(run):
        with torch.no_grad():
            run.net.merge_scale.fill_(0 if run.progress.iteration == 3 else math.nan)
        moved.append(not torch.equal(run.net.input_scale, run.net.input_scale.new_ones(1)))

    before_steps(monkeypatch, breaks)
    monkeypatch.setattr(Pulse, "due", lambda *_: True)
    with pytest.raises(SystemExit) as ended:
        call("--epoch", "20", "--testset_name", "none")
    assert "no finite loss or gradient in 10 iterations in a row, up to iteration 14" in ended.value.code
    assert moved == [False] * 4 + [True] * 10
    progress, printed = read_state(tmp_path).progress, capsys.readouterr().out
    assert (progress.iteration, progress.skipped, progress.skipped_in_a_row) == (12, 11, 8)  # of the last whole epoch
    assert "[01/20] loss: nan" in printed and "[02/20] loss: 0." in printed
    assert ", 3 iterations skipped so far" in printed


def test_a_checkpoint_of_part_of_an_epoch_is_replaced_by_the_whole_ones(call, monkeypatch):
    saved = []
    monkeypatch.setattr(loop, "save_checkpoint", lambda net, folder, epoch: saved.append(epoch))
    call("--epoch", "3", "--max_iters", "1", "--testset_name", "none")
    assert saved == [1]
    call("--epoch", "3", "--testset_name", "none")
    assert saved == [1, 1, 3]  # of 10 epochs between checkpoints, 3 being the last


def test_a_test_that_fails_is_skipped(call, monkeypatch, tmp_path, capsys):
    modes = []

    def exhausted(process, net, *_, **__):
        modes.append(net.training)
        raise UserError("there is not enough memory to reconstruct camera")

    monkeypatch.setattr(report, "evaluate_spread", exhausted)
    before_steps(monkeypatch, lambda run: modes.append(run.net.training))
    call("--iters_per_epoch", "1")
    assert modes == [True, False, False, True, False, False]  # two ratios after each of two epochs
    log = (tmp_path / "log" / f"{NAME}.txt").read_text()
    assert log.count("test skipped: there is not enough memory to reconstruct camera") == 4


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 34359738368 bytes."),
])
def test_a_step_without_enough_memory_says_what_to_do(call, monkeypatch, capsys, error):
    def exhausted(*_):
        raise error

    monkeypatch.setattr(train, "train_step", exhausted)
    with pytest.raises(SystemExit) as ended:
        call()
    assert ended.value.code == 2
    assert capsys.readouterr().err == ("error: there is not enough memory for a training step: choose a smaller "
                                       "--batch_size or --patch_size, or --invertible both\n")


def test_auto_takes_what_fits_and_less_where_memory_runs_out_all_the_same(call, monkeypatch, tmp_path, capsys):
    """The iteration is repeated with the same crops: the weights are those of a run that held less from the start."""
    step = train.train_step

    def exhausted(run, batches):
        if run.net.invertible == "none" and run.progress.iteration == 1:
            next(batches)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return step(run, batches)

    call("--invertible", "sampling", place=tmp_path / "lean")
    capsys.readouterr()
    monkeypatch.setattr(train, "train_step", exhausted)
    call("--invertible", "auto")
    out = capsys.readouterr().out
    assert "note       --invertible auto is none: a step is expected to hold 0.0" in out
    assert out.count("not enough memory after all: goes on with --invertible sampling") == 1
    ours, lean = weights(tmp_path), weights(tmp_path / "lean")
    assert all(torch.allclose(ours[name], lean[name], atol=1e-6) for name in lean)
    monkeypatch.setattr("model.memory.step_bytes", lambda *_: 10**15)
    call("--invertible", "auto", "--epoch", "3")  # goes on, and nothing fits
    assert "--invertible auto is both: a step is expected to hold 1e+06 GB" in capsys.readouterr().out


def test_tests_that_a_kill_prevented_are_made_up_for(call, whole, monkeypatch, tmp_path, capsys):
    """In the middle of a run and at its end; with the scores of a run that was not killed."""
    test, ends = report.test, {2, 4}

    def killed(run, measurement, stop):
        if run.progress.iteration in ends and measurement.settings["cs_ratio"] == 0.5:
            ends.remove(run.progress.iteration)
            raise SystemExit
        return test(run, measurement, stop)

    monkeypatch.setattr(report, "test", killed)
    for _ in range(2):
        with pytest.raises(SystemExit):
            call()
    call()
    assert not ends and capsys.readouterr().out.splitlines()[-1].startswith("nothing is left to do; ")
    assert logged_scores(tmp_path) == logged_scores(whole) and len(logged_scores(whole)) == 2


def test_a_run_that_has_not_begun_may_be_started_with_other_settings(call, monkeypatch, tmp_path):
    """Which is what the message about a lack of memory advises."""
    def exhausted(*_):
        raise MemoryError

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(train, "train_step", exhausted)
        call("--batch_size", "4")
    assert read_state(tmp_path).progress.iteration == 0
    call("--max_iters", "1")
    assert read_state(tmp_path).configuration["batch_size"] == 2


def test_a_seed_of_any_length_and_many_unreadable_pictures(call, data, tmp_path, capsys):
    folder = shutil.copytree(data / "pristine_images", tmp_path / "pictures")
    for number in range(12):
        (folder / f"broken{number:02}.png").write_bytes(b"")
    call("--train_dir", str(folder), "--seed", "5000000000", "--max_iters", "1", "--testset_name", "Set11")
    assert "and 2 more" in (printed := capsys.readouterr().out) and f"are named in {tmp_path}" in printed
    assert "note       no test after each epoch, since there is no folder" in printed  # that is tested on by default
    assert "cannot be read: broken00.png, broken01.png" in (log := (tmp_path / "log" / f"{NAME}.txt").read_text())
    assert "broken11.png" in log
    assert all(re.search(r", \d{4}-\d\d-\d\d \d\d:\d\d:\d\d$", line) for line in log.splitlines())


@pytest.mark.parametrize(("more", "sentence"), [
    (["--patch_size", "40"], "--patch_size must be a multiple of 16 here, not 40"),
    (["--patch_size", "27", "--block_size", "3"], "--patch_size must be a multiple of 24 here, not 27"),
    (["--operator", "cs,mri", "--operator_settings", "mri.complex_images=true"],
     "measures images of 2 channels, but pictures are measured in one, their luminance"),
    (["--operator", "cs,ct", "--operator_settings", "ct.angles=0"], "angles must be at least 1, not 0"),
    (["--operator", "cs,deblurring", "--operator_settings", "deblurring.side=4"], "side must be odd"),
    (["--noise", "1e400"], "a standard deviation, or a range as 0-0.05, not 1e400"),
    (["--cs_ratio", "0.5-0.1"], "--cs_ratio: the range 0.5-0.1 must go from a lower ratio to a higher one"),
    (["--cs_ratio", "0.1-1.5"], "--cs_ratio: must lie in (0, 1], not 1.5"),
    (["--cs_ratio", "10"], "--cs_ratio: must lie in (0, 1], not 10; 10 % is 0.1"),
    (["--ema", "1"], "--ema: must be a number below 1, not 1"),
    (["--clip", "0"], "--clip: must be a number above 0, not 0"),
    (["--accumulate", "0"], "--accumulate: must be a whole number of at least 1, not 0"),
    (["--cache_dir", "/dev/null/cache"], "--cache_dir"),
    (["--cs_ratio", "1.5"], "--cs_ratio: must lie in (0, 1], not 1.5"),
    (["--cs_ratio", "ten"], "--cs_ratio: must be a number, or several as 0.1/0.3/0.5, not ten"),
    (["--train_dir", ""], "--train_dir: must not be empty; the current folder is ."),
    (["--batch_size", "0"], "--batch_size: must be a whole number of at least 1, not 0"),
    (["--epoch", "ten"], "--epoch: must be a whole number of at least 1, not ten"),
    (["--learning_rate", "nan"], "--learning_rate: must be a number above 0, not nan"),
    (["--precision", "fp8"], "--precision: invalid choice: 'fp8'"),
    (["--device", "meta"], "--device meta cannot be used"),
    (["--device", "mps:9"], "--device mps:9 cannot be used"),
    (["--model_dir", "/dev/null/weight"], "choose another --model_dir"),
    (["--log_dir", "/dev/null"], "cannot write into /dev/null (it is a file); choose another --log_dir"),
    (["--testset_name", "Tinny"], "Tinny: a test set is a folder of pictures in"),
    (["--train_dir", "nowhere"], "there is no folder nowhere"),
    (["--patch_size", "512"], "none of the 2 pictures"),
    (["--width", "30"], "--width 30"),
    (["--width", "16"], "the width must be a multiple of 32"),
    (["--base_model", "nowhere.pkl"], "nowhere.pkl"),
    (["--device", "toaster"], "--device toaster"),
])
def test_a_users_mistake_is_one_sentence_and_status_2(call, capsys, more, sentence):
    with pytest.raises(SystemExit) as ended:
        call(*more)
    printed = capsys.readouterr()
    assert ended.value.code == 2
    assert printed.err.startswith("error: ") and printed.err.count("\n") == 1 and sentence in printed.err


def test_a_network_of_two_channels_is_not_trained_on_pictures(call, capsys, tmp_path):
    IDM((32, 64), 2, in_channels=2).save_pretrained(tmp_path / "channels")
    with pytest.raises(SystemExit) as ended:
        call("--base_model", str(tmp_path / "channels"))
    assert ended.value.code == 2 and "channels is for images of 2 channels, but" in capsys.readouterr().err


def test_an_earlier_run_is_neither_overwritten_nor_continued_with_other_settings(call, whole, capsys):
    for more, sentence in [
        (["--no-resume"], "holds an earlier run; leave out --no-resume"),
        (["--batch_size", "4", "--invertible", "none", "--compile"],  # the latter may change
         "holds a run with other settings: batch_size was 2, is 4; use the same"),
        (["--accumulate", "2", "--ema", "0.9"], "accumulate was 1, is 2; ema was None, is 0.9; use"),
    ]:
        with pytest.raises(SystemExit) as ended:
            call(*more, place=whole)
        assert ended.value.code == 2 and sentence in capsys.readouterr().err


def test_processes_with_other_settings_are_refused(monkeypatch):
    """A machine whose launcher was told otherwise would train something else, in step with the rest."""
    process, mine = Process(0, 2, torch.device("cpu")), {"learning_rate": "0.0001", "seed": "1", "clip": "None"}
    monkeypatch.setattr(Process, "all_gather", lambda _, thing: [thing, {**thing, **other}])
    other = {}
    start.check_agreement(process, mine)
    other = {"learning_rate": "0.001", "clip": "1.0"}
    with pytest.raises(UserError, match="different settings: --learning_rate 0.0001 and 0.001, --clip None and 1.0; "):
        start.check_agreement(process, mine)


@pytest.mark.parametrize(("have", "expected"), [([True, True], "bf16"), ([True, False], "fp16")])
def test_half_precision_is_one_that_all_gpus_have(monkeypatch, have, expected):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: have[0])
    monkeypatch.setattr(Process, "all_gather", lambda _, thing: [thing, have[1]])
    assert start.default_precision(Process(0, 2, torch.device("cuda"))) == expected


def test_a_folder_that_another_process_trains_in_is_left_alone(call, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(files, "PATIENCE", 0.2)
    folder = tmp_path / "weight" / NAME
    folder.mkdir(parents=True)
    with held_by_another_process(folder):
        with pytest.raises(SystemExit) as ended:
            call()
        assert ended.value.code == 2
        assert f"another process is writing into {folder}; choose another --model_dir" in capsys.readouterr().err
        assert not list_states(folder)
    call("--max_iters", "1")
    assert weights(tmp_path)


@pytest.mark.parametrize("name", ["net_params_50.pkl", "pretrained"])
def test_checkpoints_in_the_runs_folder_are_not_overwritten(call, tmp_path, capsys, name):
    folder = tmp_path / "weight" / NAME
    folder.mkdir(parents=True)
    (folder / name).write_bytes(b"published")
    for more in ([], ["--no-resume"]):
        with pytest.raises(SystemExit):
            call(*more)
        assert "holds weights but no state to go on from" in capsys.readouterr().err
    assert (folder / name).read_bytes() == b"published"


def test_a_folder_with_an_odd_description_is_no_idm(tmp_path):
    for description in ("[]", "null", "{", '{"_class_name": "UNet2DConditionModel"}'):
        (tmp_path / "config.json").write_text(description)
        assert not start.holds_idm(tmp_path)
    (tmp_path / "config.json").write_text('{"_class_name": "IDM"}')
    assert start.holds_idm(tmp_path)


def test_a_run_and_a_file_in_it_are_idms(tmp_path):
    net = IDM.compact(32, num_steps=1)
    net.save_pretrained(tmp_path / "pretrained")
    for path in (tmp_path, tmp_path / "pretrained", tmp_path / "pretrained" / "diffusion_pytorch_model.safetensors"):
        assert start.holds_idm(path), path
    assert not start.holds_idm(tmp_path / "other")


def test_training_can_start_from_a_checkpoint(whole, tmp_path):
    published, alone = IDM((32, 64), num_steps=2, shuffle=4), Process(0, 1, torch.device("cpu"))
    torch.save(published.official_state_dict(), tmp_path / "net_params_2.pkl")
    for source, expected in ((whole / "weight" / NAME / "pretrained", weights(whole)),
                             (tmp_path / "net_params_2.pkl", published.state_dict())):
        settings = Settings(base_model=str(source), step_number=2, patch_size=32, precision="fp32").completed()
        assert same(start.build_run(settings, alone, None, None, start.build_idm).net.state_dict(), expected)
        with pytest.raises(UserError, match="use --step_number 2"):
            start.build_run(replace(settings, step_number=3), alone, None, None, start.build_idm)


def test_the_networks_parts_and_what_is_drawn_are_kept_in_the_state_and_the_weights(call, tmp_path, capsys):
    """Two halves of a run and the whole of it, with everything that is not as published."""
    coupling, steps = ["--coupling", "additive"], ["--random_steps"]
    more = ["--noise", "0-0.05", "--schedule", "dynamic", "--schedule_settings", "scale=10", "--attention", "first",
            "--attention_window", "2", "--width", "32", "--shuffle", "2", "--epoch", "1", "--testset_name", "none"]
    name = f"{NAME}_noise_0-0.05"
    call(*more, *coupling, *steps, place=tmp_path / "whole")
    call(*more, *coupling, *steps, "--max_iters", "1")
    call(*more, *coupling, *steps)
    whole, halves = (IDM.from_checkpoint(place / "weight" / name) for place in (tmp_path / "whole", tmp_path))
    assert same(whole.state_dict(), halves.state_dict())
    config = {"coupling": "additive", "schedule": "dynamic", "schedule_settings": {"scale": 10},
              "attention": [True, False], "attention_window": 2}
    assert {key: whole.config[key] for key in config} == config
    torch.manual_seed(2025)
    fresh = IDM.compact(32, 2, 2, coupling="additive", schedule="dynamic", schedule_settings={"scale": 10},
                        attention=(True, False)).state_dict()
    assert not any(torch.equal(whole.state_dict()[key], fresh[key]) for key in ("log_damping", "schedule.gamma"))
    for flags, sentence in (
            ([*more, *steps], "coupling was additive, is None"),
            ([*more, *coupling], "random_steps was True, is False"),
            ([*more, *coupling, *steps, "--base_model", str(tmp_path / "weight" / name), "--coupling", "weighted",
              "--model_dir", str(tmp_path)], "has coupling additive; leave out --coupling"),
            ([*coupling, "--width", "32"], "--width 32 --shuffle 4 makes no network: an injector of width 32"),
            (["--schedule_settings", "scale"], "must be key=number, not scale"),
            (["--schedule_settings", "tail=1"], "'learned' cannot have the settings {'tail': 1}")):
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            call(*flags)
        assert ended.value.code == 2 and sentence in capsys.readouterr().err, sentence


def test_without_flags_all_is_as_published(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py"])
    settings = train.parse_settings("")
    assert settings == Settings().completed()
    assert (settings.epoch, settings.learning_rate, settings.batch_size, settings.patch_size) == (50, 1e-4, 8, 256)
    assert (settings.name, settings.loss, settings.lr_schedule) == ("R_0.10_T_3_B_32", "l1", "step")
