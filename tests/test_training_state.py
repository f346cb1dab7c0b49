"""States and checkpoints of a training run come back as they were, and what is damaged is refused."""
import os
import random

import numpy as np
import pytest
import torch

from model import IDM, BlockCompressedSensing
from utils import training_state
from utils.errors import UserError

REAL_SAVE = torch.save


def state(number: float) -> dict:
    return {
        "configuration": {"batch_size": 8, "cs_ratio": "0.1"},
        "network": {"block_out_channels": (32, 64)},
        "model": {"weight": torch.full((1000,), float(number))},
        "optimizer": {},
        "scaler": {},
        "progress": {"iteration": int(number)},
        "random": [training_state.random_states()],
    }


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "run" / "state.pt"
    training_state.save_state(path, state(1))
    return path


def full_disk(*args, **kwargs):
    raise OSError(28, os.strerror(28))


def half_a_save(thing, file):
    file.write(b"PK\x03\x04 the beginning of a file")
    raise RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0\nand more")


def test_a_state_comes_back(path):
    training_state.save_state(path, state(2))
    loaded = training_state.load_state(path)
    assert torch.equal(loaded["model"]["weight"], torch.full((1000,), 2.0))
    assert loaded["progress"] == {"iteration": 2} and loaded["network"] == {"block_out_channels": (32, 64)}
    assert os.listdir(path.parent) == ["state.pt"]


@pytest.mark.parametrize(("module", "name", "failure", "reason"), [
    (torch, "save", half_a_save, "unexpected pos 64 vs 0"),
    (torch, "save", full_disk, "No space left on device"),
    (os, "fsync", full_disk, "No space left on device"),
    (os, "replace", full_disk, "No space left on device"),
])
def test_a_failure_while_writing_leaves_the_old_state(path, monkeypatch, module, name, failure, reason):
    with monkeypatch.context() as patch:
        patch.setattr(module, name, failure)
        with pytest.raises(UserError, match=f"cannot write .*state.pt .*{reason}.*then go on with --resume"):
            training_state.save_state(path, state(2))
    assert training_state.load_state(path)["progress"] == {"iteration": 1}
    assert os.listdir(path.parent) == ["state.pt"]


def test_an_interrupt_while_writing_leaves_the_old_state(path, monkeypatch):
    def interrupted(thing, file):
        file.write(b"PK")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", interrupted)
        with pytest.raises(KeyboardInterrupt):
            training_state.save_state(path, state(2))
    assert training_state.load_state(path)["progress"] == {"iteration": 1}


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


def test_code_in_a_state_is_not_run(path):
    class Harmful:
        def __reduce__(self):
            return (os.mkdir, (str(path.parent / "harm"),))

    REAL_SAVE({**state(1), "model": Harmful()}, path)
    with pytest.raises(UserError, match="not a whole training state"):
        training_state.load_state(path)
    assert not (path.parent / "harm").exists()


def test_other_files_are_refused(path):
    torch.save({"weight": torch.zeros(1)}, path)
    with pytest.raises(UserError, match="not a training state of this program"):
        training_state.load_state(path)


def test_other_settings_are_refused_with_every_difference(path):
    saved = {"batch_size": 8, "cs_ratio": "0.1", "epoch": 5}
    training_state.check_configuration(saved, dict(saved), path)
    with pytest.raises(UserError, match="batch_size was 8, is 4; epoch was 5, is None; use the same"):
        training_state.check_configuration(saved, {"batch_size": 4, "cs_ratio": "0.1"}, path)


def test_random_states_survive_the_file(path):
    training_state.save_state(path, state(1))
    expected = random.random(), np.random.rand(), torch.rand(3).tolist(), np.random.randn()
    training_state.restore_random_states(training_state.load_state(path)["random"][0])
    assert (random.random(), np.random.rand(), torch.rand(3).tolist(), np.random.randn()) == expected


@pytest.mark.parametrize("heads", [8, 1])
def test_checkpoints_reconstruct_what_the_network_did(tmp_path, heads):
    torch.manual_seed(0)
    net = IDM((32, 64), num_steps=1, num_attention_heads=heads).eval()
    with torch.no_grad():
        for parameter in net.parameters():
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
