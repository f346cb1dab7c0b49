"""A training run that is killed, at any moment, ends with the very weights of one that never was."""
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import psutil
import pytest
import skimage
import torch

from tests.training.test_distributed import free_port
from utils.training import state as training_state

ROOT = Path(__file__).resolve().parents[2]
NAME = "R_0.10to0.50_T_1_B_16"
KILLS = 20
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for name in ("camera", "coins"):
        picture = cv2.imread(str(Path(skimage.__file__).parent / "data" / f"{name}.png"))
        cv2.imwrite(str(folder / f"{name}.png"), picture[:100, :120])
    return folder


def flags(pictures: Path, place: Path, *more: str) -> list[str]:
    """A run that saves several times a second, and uses all that has a state of its own."""
    return ["--base_model", "compact", "--width", "32", "--step_number", "1", "--cs_ratio", "0.1-0.5",
            "--block_size", "16", "--patch_size", "32", "--batch_size", "1", "--epoch", "3", "--iters_per_epoch", "20",
            "--save_minutes", "0.002", "--save_interval", "2", "--ema", "0.9", "--clip", "0.5", "--lr_schedule",
            "cosine", "--device", "cpu", "--testset_name", "none", "--train_dir", str(pictures), "--data_dir",
            str(place), "--model_dir", str(place / "weight"), "--log_dir", str(place / "log"), *more]


def train(pictures: Path, place: Path, processes: int, kills: int, longest_life: float = 0) -> dict:
    """Train with so many kills on the way; what `killed_training` says of it."""
    task = {"flags": flags(pictures, place), "processes": processes, "port": free_port(), "folder": str(place),
            "kills": kills, "longest_life": longest_life, "seed": processes}
    script = [sys.executable, str(Path(__file__).with_name("killed_training.py")), json.dumps(task)]
    printed = subprocess.run(script, env={**ENVIRONMENT, "OUTPUT": str(place / "output.txt")}, capture_output=True,
                             text=True, timeout=600)
    assert printed.returncode == 0, printed.stderr
    report = json.loads(printed.stdout)
    assert report["ended"], (place / "output.txt").read_text()
    return report


def final(place: Path) -> dict:
    """What a run ended with, but for what a kill may change: nothing."""
    state, notes = training_state.load_newest_state(place / "weight" / NAME)
    assert state.progress.iteration == 60 and not notes
    assert state.unlogged.pop("iteration") == 60
    return {**vars(state), "unlogged": None}  # which holds the seconds that it took


def same(a: object, b: object) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.fixture(scope="module", params=[1, 2], ids=["one process", "two processes"])
def uninterrupted(request, pictures, tmp_path_factory) -> tuple[int, Path, float]:
    place = tmp_path_factory.mktemp("uninterrupted")
    return request.param, place, train(pictures, place, request.param, kills=0)["seconds"]


def test_runs_killed_at_twenty_random_moments_end_as_if_they_never_were(uninterrupted, pictures, tmp_path):
    processes, place, seconds = uninterrupted
    report = train(pictures, tmp_path, processes, KILLS, longest_life=1 + seconds / 16)
    assert report["kills"] == KILLS, "the run was over too early for all kills: give it more iterations"
    assert report["half_written"] > 0, "no kill came while a file was being written"
    assert same(final(tmp_path), final(place))
    folder = tmp_path / "weight" / NAME
    states = training_state.list_states(folder)
    assert len(states) == 2 and {*folder.iterdir()} - {folder / ".lock"} == {*states, folder / "pretrained"}
    records = [json.loads(line) for line in (tmp_path / "log" / f"{NAME}.jsonl").read_text().splitlines()]
    assert [record["iteration"] for record in records] == [20, 40, 60]


def test_a_killed_worker_is_replaced_under_max_restarts(uninterrupted, pictures, tmp_path):
    processes, place, _ = uninterrupted
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    agent = subprocess.Popen([sys.executable, *launcher, "--max-restarts", "2", str(ROOT / "train.py"),
                              *flags(pictures, tmp_path)],
                             env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    folder = tmp_path / "weight" / NAME
    try:
        until = time.monotonic() + 120
        while len(training_state.list_states(folder)) < 2 and time.monotonic() < until:
            time.sleep(0.005)
        psutil.Process(agent.pid).children()[-1].send_signal(signal.SIGKILL)
        printed = agent.communicate(timeout=240)[0]
    finally:
        agent.kill()
    assert agent.returncode == 0, printed
    assert "resumed from iteration" in printed
    assert same(final(tmp_path), final(place))


def test_two_processes_train_as_one_that_accumulates_and_can_take_turns_with_it(pictures, tmp_path):
    """Five steps of Adam on the same crops; then the other way of sharing them out, and one that is not the same."""
    def call(place: Path, processes: int, accumulate: int, iterations: int) -> str:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        command = [sys.executable, *(launcher if processes > 1 else []), str(ROOT / "train.py"),
                   *flags(pictures, place), "--accumulate", str(accumulate), "--max_iters", str(iterations)]
        result = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, result.stderr
        return result.stdout

    call(tmp_path / "two", processes=2, accumulate=1, iterations=5)
    call(tmp_path / "one", processes=1, accumulate=2, iterations=5)
    one, two = (training_state.load_newest_state(tmp_path / place / "weight" / NAME)[0] for place in ("one", "two"))
    # Not only within rounding: the mean of two gradients is the same in either order.
    assert all(same(getattr(one, part), getattr(two, part)) for part in ("model", "ema", "optimizer"))
    assert one.progress.crops == 10 and vars(one.progress) == pytest.approx(vars(two.progress), rel=1e-6)
    printed = call(tmp_path / "two", processes=1, accumulate=2, iterations=6)
    assert "2 process(es) wrote the state, 1 go on; an iteration was 2 crops, and is 2" in printed
    printed = call(tmp_path / "two", processes=2, accumulate=2, iterations=7)
    assert "1 process(es) wrote the state, 2 go on; an iteration was 2 crops, and is 4" in printed


def test_a_full_disk_ends_the_run_with_a_sentence_and_leaves_the_last_state(pictures, tmp_path):
    command = [sys.executable, str(ROOT / "train.py"), *flags(pictures, tmp_path)]
    subprocess.run([*command, "--max_iters", "2"], env=ENVIRONMENT, check=True, capture_output=True, timeout=120)
    folder = tmp_path / "weight" / NAME
    before = {path.name: path.read_bytes() for path in folder.glob("state_*")}
    assert len(before) == 2 and "state_00000002.pt" in before
    limit = int(0.99 * len(before["state_00000002.pt"]))

    def small_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    result = subprocess.run(command, env=ENVIRONMENT, preexec_fn=small_files, capture_output=True, text=True,
                            timeout=120)
    assert result.returncode == 2
    assert result.stderr.startswith("error: cannot write ") and result.stderr.count("\n") == 1
    assert "see that the disk has room" in result.stderr and "start the same command again" in result.stderr
    assert {path.name: path.read_bytes() for path in folder.glob("state_*")} == before
    assert not {*folder.glob(".*")} - {folder / ".lock"}
