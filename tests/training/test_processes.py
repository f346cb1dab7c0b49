"""train.py as processes of their own: the command line, several of them together, and signals to all."""
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.training.test_train_cli import NAME, call_train, flags, read_state, same, weights
from tests.training.test_train_cli import data as data
from utils.training.state import list_states

ROOT = Path(__file__).resolve().parents[2]
LAUNCHER = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}

pytestmark = pytest.mark.slow


def start(*arguments: str, launcher: tuple[str, ...] = (), script: Path = ROOT / "train.py") -> tuple[int, str, str]:
    """Run train.py; its exit status, and what it says on stdout and stderr."""
    ended = subprocess.run([sys.executable, *launcher, str(script), *arguments], env=ENVIRONMENT, capture_output=True,
                           text=True, timeout=600)
    return ended.returncode, ended.stdout, ended.stderr


def test_one_process_and_two_that_share_its_batches_train_one_model(data, tmp_path):
    status, printed, complaints = start(*flags(data, tmp_path / "one", "--accumulate", "2", "--random_steps"))
    assert status == 0, complaints
    assert set((tmp_path / "one" / "log" / f"{NAME}.txt").read_text().splitlines()) <= set(printed.splitlines())
    shutil.copytree(data / "pristine_images", data / "Pair")
    shutil.move(data / "Pair" / "more" / "coffee.png", data / "Pair" / "coffee.png")
    status, printed, complaints = start(*flags(data, tmp_path / "two", "--random_steps", "--testset_name", "Pair"),
                                        launcher=LAUNCHER)
    assert status == 0 and printed.count("[02/2] loss") == 1, complaints
    assert same(weights(tmp_path / "one"), weights(tmp_path / "two"))
    state = read_state(tmp_path / "two")
    assert state.processes == 2 and len(state.random) == 2
    board = EventAccumulator(str(tmp_path / "two" / "log" / NAME))
    board.Reload()
    assert {tag.split("/")[-1] for tag in board.Tags()["images"]} == {"astronaut", "coffee"}  # each rank tested one


def test_processes_that_find_different_states_all_stop(data, tmp_path):
    """Each rank has a folder of its own here, and rank 1's holds no state; the mistake is printed once."""
    call_train(tmp_path / "whole", data, "--max_iters", "1")
    shutil.copytree(tmp_path / "whole" / "weight", tmp_path / "0" / "weight")
    script = tmp_path / "script.py"
    script.write_text(f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
sys.argv += ["--model_dir", {str(tmp_path)!r} + "/" + os.environ["RANK"] + "/weight"]
import train
train.errors.run(train.main)
""")
    status, _, complaints = start(*flags(data, tmp_path), launcher=LAUNCHER, script=script)
    assert status != 0 and complaints.count("error: ") == 1, complaints
    assert "error: the processes find different states to go on from; --model_dir must be" in complaints


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_all_processes_of_a_run_does_not_end_its_workers(data, tmp_path, number):
    """As Ctrl-C sends it, and `torch.distributed.run` where it ends."""
    more = ["--num_workers", "2", "--iters_per_epoch", "100000", "--save_minutes", "0.001"]
    command = [sys.executable, str(ROOT / "train.py"), *flags(data, tmp_path, *more)]
    training = subprocess.Popen(command, env=ENVIRONMENT, start_new_session=True, stdout=subprocess.PIPE,
                                stderr=subprocess.STDOUT, text=True)
    try:
        until = time.monotonic() + 300
        while len(list_states(tmp_path / "weight" / NAME)) < 2 and time.monotonic() < until:
            time.sleep(0.05)
        os.killpg(training.pid, number)
        printed = training.communicate(timeout=300)[0]
    finally:
        training.kill()
    assert training.returncode == 130 and "stopped by a signal after iteration" in printed, printed
