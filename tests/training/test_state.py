"""States and checkpoints of a training run come back as they were, and what is damaged is refused."""
import errno
import os
import random
from copy import deepcopy

import numpy as np
import pytest
import torch

from model import IDM, BlockCompressedSensing
from utils.errors import UserError
from utils.training import start
from utils.training import state as training_state

REAL_SAVE = torch.save


def state(number: int) -> training_state.TrainingState:
    return training_state.TrainingState(
        configuration={"batch_size": 8, "cs_ratio": "0.1"}, processes=1, network={"block_out_channels": (32, 64)},
        model={"weight": torch.full((1000,), float(number))}, ema=None, optimizer={}, scaler={},
        progress=training_state.Progress(number), random=[training_state.random_states()])


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "run"
    training_state.save_state(folder, state(1))
    return folder


@pytest.fixture
def path(folder):
    return folder / "state_00000001.pt"


def newest(folder) -> int:
    return training_state.load_newest_state(folder)[0].progress.iteration


def full_disk(*args, **kwargs):
    raise OSError(28, os.strerror(28))


def half_a_save(thing, file):
    file.write(b"PK\x03\x04 the beginning of a file")
    raise RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0\nand more")


def test_a_state_comes_back_and_the_newest_two_are_kept(folder):
    for number in (2, 300):
        training_state.save_state(folder, state(number))
    loaded, notes = training_state.load_newest_state(folder)
    assert torch.equal(loaded.model["weight"], torch.full((1000,), 300.0)) and not notes
    assert loaded.progress.iteration == 300 and loaded.network == {"block_out_channels": (32, 64)}
    assert sorted(os.listdir(folder)) == ["state_00000002.pt", "state_00000300.pt"]


def test_a_new_run_has_no_state(tmp_path):
    (tmp_path / "state_of_the_art.pt").touch()
    assert training_state.load_newest_state(tmp_path) == (None, []) == training_state.load_newest_state(tmp_path / "x")


def test_of_a_damaged_state_the_one_before_it_is_used_with_a_sentence(folder):
    training_state.save_state(folder, state(2))
    damaged = folder / "state_00000002.pt"
    damaged.write_bytes(damaged.read_bytes()[:-7])
    (folder / ".state_00000003.pt.partial").write_bytes(b"of a killed process")
    loaded, notes = training_state.load_newest_state(folder)
    assert loaded.progress.iteration == 1 and len(notes) == 1
    assert "state_00000002.pt is not a whole training state" in notes[0]
    assert notes[0].endswith("; going on from the one before it")
    # The run goes on, passes by where the damaged one was written, or not; that one never counts as one of the two.
    (folder / "state_00000009.pt").write_bytes(b"")
    training_state.save_state(folder, state(4))
    assert sorted(os.listdir(folder)) == ["state_00000002.pt", "state_00000004.pt"]
    assert newest(folder) == 4
    for path in folder.iterdir():
        path.write_bytes(b"")
    with pytest.raises(UserError, match="00000004.pt is not .*; .*00000002.pt is not .*; remove .*run to start again"):
        training_state.load_newest_state(folder)


@pytest.mark.parametrize(("module", "name", "failure", "reason"), [
    (torch, "save", half_a_save, "unexpected pos 64 vs 0"),
    (torch, "save", full_disk, "No space left on device"),
    (os, "fsync", full_disk, "No space left on device"),
    (os, "replace", full_disk, "No space left on device"),
])
def test_a_failure_while_writing_leaves_the_old_states(folder, monkeypatch, module, name, failure, reason):
    with monkeypatch.context() as patch:
        patch.setattr(module, name, failure)
        with pytest.raises(UserError, match=f"cannot write .*_00000002.pt .*{reason}.*then start the same command"):
            training_state.save_state(folder, state(2))
    assert newest(folder) == 1
    assert os.listdir(folder) == ["state_00000001.pt"]


def test_an_interrupt_while_writing_leaves_the_old_state(folder, monkeypatch):
    def interrupted(thing, file):
        file.write(b"PK")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", interrupted)
        with pytest.raises(KeyboardInterrupt):
            training_state.save_state(folder, state(2))
    assert newest(folder) == 1


@pytest.mark.parametrize(("failure", "message"), [
    (PermissionError(errno.EACCES, "Permission denied"), "cannot read .*_00000002.pt .Permission denied"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "there is not enough memory to read .*_00000002.pt"),
])
def test_a_state_that_cannot_be_read_here_is_not_taken_for_damaged(folder, monkeypatch, failure, message):
    """Or the one before it would be used, and then written over the newer one."""
    def fail(*_, **__):
        raise failure

    training_state.save_state(folder, state(2))
    monkeypatch.setattr(torch, "load", fail)
    with pytest.raises(UserError, match=message):
        training_state.load_newest_state(folder)


@pytest.mark.parametrize("kept", [0, 10, 0.5, 0.99])
def test_a_truncated_state_is_refused(path, kept):
    data = path.read_bytes()
    path.write_bytes(data[:int(kept * len(data)) if kept < 1 else kept])
    with pytest.raises(UserError, match="not a whole training state"):
        training_state.load_state(path)


def test_a_changed_number_is_noticed(path):
    data = bytearray(path.read_bytes())
    place = data.index(np.full(10, 1, np.float32).tobytes())
    data[place + 4] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match="damaged"):
        training_state.load_state(path)


def test_flipped_bits_are_noticed_or_change_nothing(path):
    """Those of zip's directory above all, from which torch.load takes more than it checks."""
    whole, expected = path.read_bytes(), training_state.load_state(path)
    directory = whole.index(b"PK\x01\x02")
    random, refused = np.random.default_rng(0), 0
    for bit in random.choice(np.arange(8 * directory, 8 * len(whole)), 1000, replace=False):
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        try:
            assert repr(training_state.load_state(path)) == repr(expected)
        except UserError:
            refused += 1
    assert refused > 100


def test_code_in_a_state_is_not_run(path):
    class Harmful:
        def __reduce__(self):
            return (os.mkdir, (str(path.parent / "harm"),))

    REAL_SAVE({**vars(state(1)), "progress": {}, "model": Harmful()}, path)
    with pytest.raises(UserError, match="not a whole training state"):
        training_state.load_state(path)
    assert not (path.parent / "harm").exists()


@pytest.mark.parametrize("other", [{"weight": torch.zeros(1)}, torch.zeros(3), [], {"progress": {"loss": 1}}])
def test_other_files_are_refused(path, other):
    torch.save(other, path)
    with pytest.raises(UserError, match="not a training state of this program"):
        training_state.load_state(path)


def test_random_states_survive_the_file(folder, path):
    training_state.save_state(folder, state(1))
    expected = random.random(), np.random.rand(), torch.rand(3).tolist(), np.random.randn()
    training_state.restore_random_states(training_state.load_state(path).random[0])
    assert (random.random(), np.random.rand(), torch.rand(3).tolist(), np.random.randn()) == expected


@pytest.mark.parametrize("heads", [8, 1])
def test_checkpoints_reconstruct_what_the_network_did(tmp_path, heads):
    torch.manual_seed(0)
    net = IDM((32, 64), num_steps=1, num_attention_heads=heads).eval()
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if name == "log_damping":  # which the published format cannot say either
                continue
            parameter += 0.03 * torch.rand_like(parameter)
    operator = BlockCompressedSensing.random((32, 32), 0.25, 16, torch.Generator().manual_seed(0))
    y = operator.A(torch.rand(1, 1, 32, 32))
    assert not training_state.holds_checkpoint(tmp_path)
    training_state.save_checkpoint(net, tmp_path, 7)
    published = ["net_params_7.pkl"] if heads == 8 else []  # the format cannot say any other number
    assert sorted(os.listdir(tmp_path)) == [*published, "pretrained"]
    assert training_state.holds_checkpoint(tmp_path)
    with torch.inference_mode():
        expected = net(y, operator)
        assert expected.isfinite().all()
        for name in [*published, "pretrained"]:
            assert torch.equal(IDM.from_checkpoint(tmp_path / name)(y, operator), expected), name


def test_an_optimizers_state_follows_its_parameters_by_name():
    """Into a network with one more among them, whose first step is as that of a new optimizer."""
    def build(**more: int) -> torch.nn.ModuleDict:
        torch.manual_seed(0)
        return torch.nn.ModuleDict({name: torch.nn.Linear(size, 1, bias=False) for name, size in more.items()})

    def train(net: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
        for step in range(steps):
            optimizer.zero_grad()
            for parameter in net.parameters():
                parameter.grad = torch.full_like(parameter, 1.0 + step)
            optimizer.step()

    old, new = build(a=2, c=3), build(a=2, b=5, c=3)
    adam = torch.optim.Adam(old.parameters(), lr=0.1, fused=True)
    train(old, adam, 3)
    new.load_state_dict(old.state_dict(), strict=False)
    before = new["b"].weight.detach().clone()
    other = torch.optim.Adam(new.parameters(), lr=0.1, fused=True)
    other.load_state_dict(start.renumbered(deepcopy(adam.state_dict()), list(old.state_dict()), new))
    train(old, adam, 1)
    train(new, other, 1)
    assert all(torch.equal(old[name].weight, new[name].weight) for name in "ac")
    assert torch.allclose(before - new["b"].weight, torch.tensor(0.1))
    for damaged in ({"a.weight": torch.zeros(1, 2)}, {**new.state_dict(), "d": torch.zeros(1)},
                    {**new.state_dict(), "a.weight": torch.zeros(7)}):
        with pytest.raises(UserError, match="the weights in the state do not fit the network"):
            start.load_weights(new, damaged)
