"""What a run logs can be read back, and a run that goes on leaves no second version of anything."""
import json
import re
import sys

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer

from utils.errors import UserError
from utils.training.log import TrainingLog


def board(folder) -> EventAccumulator:
    events = EventAccumulator(str(folder), size_guidance={"images": 0})
    events.Reload()
    return events


def test_all_three_logs_say_the_same(tmp_path, capsys):
    log = TrainingLog(tmp_path, "run", 0)
    log.line("[01/2] loss: 0.5000")
    log.scalars(10, {"loss": 0.5, "gradient norm": float("nan")})
    log.picture(10, "strip/boat", np.zeros((4, 9), np.uint8))
    log.record({"iteration": 10, "loss": 0.5, "v": {"steps.0.v": float("inf")}, "alpha": [0.25]})
    log.close()
    printed = capsys.readouterr().out
    assert re.fullmatch(r"\[01/2\] loss: 0\.5000, \d{4}-\d\d-\d\d \d\d:\d\d:\d\d\n", printed)
    assert (tmp_path / "run.txt").read_text() == printed
    assert json.loads((tmp_path / "run.jsonl").read_text()) == {"iteration": 10, "loss": 0.5, "alpha": [0.25],
                                                                "v": {"steps.0.v": None}}
    events = board(tmp_path / "run")
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(10, 0.5)]
    assert events.Tags()["scalars"] == ["loss"]
    picture = events.Images("strip/boat")[0]
    assert (picture.width, picture.height, picture.step) == (9, 4, 10)


def test_a_run_that_goes_on_drops_what_it_will_say_again(tmp_path, monkeypatch):
    # TensorBoard sorts files by name, which ends in a count that all files of this process share: "9" comes after "10".
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))
    log = TrainingLog(tmp_path, "run", 0)
    for iteration in (10, 20, 30):
        log.scalars(iteration, {"loss": iteration / 100})
        log.record({"iteration": iteration})
    log.close()
    with open(tmp_path / "run.jsonl", "a") as file:
        file.write('{"iteration": 40, "lo')  # of a killed process
    log = TrainingLog(tmp_path, "run", 20)
    log.scalars(30, {"loss": 0.1})
    log.record({"iteration": 30})
    log.close()
    lines = (tmp_path / "run.jsonl").read_text().splitlines()
    assert [json.loads(line)["iteration"] for line in lines] == [10, 20, 30]
    assert [(event.step, round(event.value, 3)) for event in board(tmp_path / "run").Scalars("loss")] == [
        (10, 0.1), (20, 0.2), (30, 0.1)]


def test_without_tensorboard_the_other_logs_are_kept(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    log = TrainingLog(tmp_path, "run", 0)
    log.scalars(1, {"loss": 0.5})
    log.record({"iteration": 1})
    log.close()
    assert [path.name for path in tmp_path.iterdir()] == ["run.jsonl"]


def test_a_log_that_cannot_be_written_is_the_users_to_mend(tmp_path):
    (tmp_path / "run.txt").mkdir()
    with pytest.raises(UserError, match="cannot write .*run.txt"):
        TrainingLog(tmp_path, "run", 0).line("anything")


def test_a_run_that_begins_puts_the_log_of_another_aside(tmp_path):
    for number in range(3):
        log = TrainingLog(tmp_path, "run", 0)
        assert log.notice == (f"an earlier run's log is kept as {tmp_path / f'run.{number}.txt'} and beside it"
                              if number else "")
        log.line(f"run {number}")
        log.scalars(1, {"loss": number})
        log.record({"iteration": 1, "loss": number})
        log.close()
    for name, number in (("run", 2), ("run.1", 0), ("run.2", 1)):
        assert (tmp_path / f"{name}.txt").read_text().startswith(f"run {number}, ")
        assert json.loads((tmp_path / f"{name}.jsonl").read_text())["loss"] == number
        assert [event.value for event in board(tmp_path / name).Scalars("loss")] == [number]


def test_curves_that_cannot_be_written_are_the_users_to_mend(tmp_path):
    (tmp_path / "run").write_text("a file where TensorBoard wants a folder")
    with pytest.raises(UserError, match="cannot write .*run "):
        TrainingLog(tmp_path, "run", 0)
