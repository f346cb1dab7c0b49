"""Weights in and out, against the published key list, the golden cases and diffusers' own U-Net; and every refusal."""
import json
import logging
import os
import pickle
import random
import re
import resource
import shutil
import signal
import socket
import struct
import threading
import warnings
import zipfile
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from model import IDM, BlockCompressedSensing, WeightsError
from model.checkpoint import load_official, official_names, read_base_unet
from tests.conftest import Golden

KEY_LIST = Path(__file__).parents[1] / "golden" / "official_checkpoint_keys.txt"
PUBLISHED = [line.split("\t") for line in KEY_LIST.read_text().splitlines()]
PUBLISHED_SHAPES = [(key, tuple(map(int, shape.split("x")))) for key, shape in PUBLISHED]
WEIGHTS = "diffusion_pytorch_model.safetensors"
NORM = "unet.down_blocks.0.resnets.0.norm1.weight"  # (32,) in the narrow golden case
TWIN = "unet.down_blocks.0.rev_module_lists.0.0.body.norm1.weight"  # the same parameter


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """The same keys with the same bits."""
    assert list(found) == list(expected)
    different = [key for key in expected if found[key].dtype != expected[key].dtype
                 or not torch.equal(found[key], expected[key])]
    assert different == []


def refused(load, *args, names: tuple = ()) -> str:
    """The message of the WeightsError, which is one line and holds all of `names`."""
    with pytest.raises(WeightsError) as caught:
        load(*args)
    message = str(caught.value)
    assert message.isprintable() and len(message) < 2100
    for name in names:
        assert str(name) in message
    return message


def saved(thing, path: Path, **settings) -> Path:
    """The file that now holds `thing`: .safetensors, or what torch.save writes."""
    if path.suffix == ".safetensors":
        save_file({key: tensor.clone().contiguous() for key, tensor in thing.items()}, path)
    else:
        torch.save(thing, path, **settings)
    return path


class Malicious:
    """Unpickled, it makes a folder."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.fixture(scope="module")
def narrow() -> dict[str, Tensor]:
    """The published state_dict of the narrow golden case."""
    return Golden("narrow_T3").state_dict()


@pytest.fixture
def own(tmp_path) -> Path:
    """A folder of save_pretrained."""
    torch.manual_seed(0)
    IDM((32, 64), num_steps=2).save_pretrained(tmp_path / "own")
    return tmp_path / "own"


@pytest.fixture
def bounded():
    """Two gigabytes beyond what is held now, and a minute, which stands for ever."""
    def stop(*args):
        pytest.fail("it does not end")

    held = int(re.search(r"VmSize:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024
    former, handler = resource.getrlimit(resource.RLIMIT_AS), signal.signal(signal.SIGALRM, stop)
    resource.setrlimit(resource.RLIMIT_AS, (held + 2 * 10**9, former[1]))
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, handler)
    resource.setrlimit(resource.RLIMIT_AS, former)


@pytest.fixture
def quiet():
    """No warning and no log line of a library at all, while the test runs."""
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    loggers = [logging.getLogger(name) for name in (None, "diffusers", "transformers", "huggingface_hub")]
    for logger in loggers:
        logger.addHandler(handler)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield
    for logger in loggers:
        logger.removeHandler(handler)
    assert lines == []


@pytest.fixture
def offline(monkeypatch, tmp_path) -> Path:
    """No network and nothing in the hub's cache, whose folder this is."""
    def no_network(*args, **kwargs):
        raise AssertionError("the network was asked")

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(socket.socket, "connect", no_network)
    monkeypatch.setattr(socket, "create_connection", no_network)
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    return tmp_path / "hub"


# --- the published format ------------------------------------------------------------------------------------------

def test_keys_and_shapes_at_full_width_are_the_published_ones():
    with torch.device("meta"):
        net = IDM()
    assert [(key, tuple(tensor.shape)) for key, tensor in net.official_state_dict().items()] == PUBLISHED_SHAPES
    parameters = dict(net.named_parameters())
    assert len(parameters.pop("log_damping")) == 3  # of noise, which the published networks were not given
    assert sum(p.numel() for p in parameters.values()) == 115_265_799
    injectors = [p for name, p in parameters.items() if re.search(r"\.(lift|unlift)\.", name)]
    assert sum(p.numel() for p in injectors) == 18_060


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_a_published_file_loads_and_computes_what_the_published_code_does(golden, legacy, tmp_path, quiet):
    state = golden.state_dict()
    path = saved(state, tmp_path / "net_params_50.pkl", _use_new_zipfile_serialization=not legacy)
    net = IDM.from_checkpoint(path)
    assert tuple(net.config.block_out_channels) == tuple(golden.meta["block_out_channels"][:2])
    assert (net.config.num_steps, net.config.shuffle) == (golden.meta["num_steps"], 2)
    assert net.config.num_attention_heads == golden.meta["attention_heads"]
    assert not net.training
    with torch.no_grad():
        assert (net(golden.y, golden.operator()) - golden.x_hat).abs().max() <= 1e-4
    torch.save(net.official_state_dict(), path)
    assert_same(torch.load(path, weights_only=True), state)
    # What has two names is stored once; the rest is 1079 small records and their names.
    numbers = sum(p.numel() for p in net.parameters())
    assert numbers * 4 < path.stat().st_size < numbers * 4 * 1.3


def test_prefixes_of_wrapped_networks_are_removed(narrow, own, tmp_path):
    for end, *prefixes in ((".pkl", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "model."),
                           (".safetensors", "model._orig_mod.")):
        for prefix in prefixes:
            path = saved({prefix + key: tensor for key, tensor in narrow.items()}, tmp_path / f"a{end}")
            assert_same(dict(sorted(IDM.from_checkpoint(path).official_state_dict().items())),
                        dict(sorted(narrow.items())))
    net = IDM.from_checkpoint(own)
    net.unet = torch.compile(net.unet)  # what is compiled may be anywhere
    compiled = torch.compile(net).state_dict()
    assert sum(name.startswith("_orig_mod.unet._orig_mod.") for name in compiled) > 100
    saved(compiled, own / "diffusion_pytorch_model.bin")
    expected = IDM.from_checkpoint(own).state_dict()
    (own / WEIGHTS).unlink()
    assert_same(IDM.from_checkpoint(own).state_dict(), expected)
    both = saved(narrow | {f"_orig_mod.{NORM}": narrow[NORM]}, tmp_path / "a.pkl")
    refused(IDM.from_checkpoint, both, names=("differ only by _orig_mod.",))


def test_networks_are_found_in_the_dictionaries_of_trainers(narrow, tmp_path):
    other = {key: tensor + 1 for key, tensor in narrow.items()}
    for thing in ({"state_dict": narrow, "epoch": 3, "optimizer": {"state": {}}}, {"params": narrow}, {"model": narrow},
                  {"params": other, "params_ema": narrow}, {"model": {"state_dict": narrow}, "args": None}):
        assert_same(IDM.from_checkpoint(saved(thing, tmp_path / "a.pkl")).official_state_dict(), narrow)


def test_half_precision_another_shuffle_and_a_diverged_network_load(narrow, tmp_path):
    halves = {key: tensor.half() for key, tensor in narrow.items()}
    loaded = IDM.from_checkpoint(saved(halves, tmp_path / "a.pkl")).official_state_dict()
    assert_same(loaded, {key: tensor.float() for key, tensor in halves.items()})
    net = IDM((64, 128), num_steps=1, shuffle=4)
    loaded = IDM.from_checkpoint(saved(net.official_state_dict(), tmp_path / "a.pkl"))
    assert (loaded.config.num_steps, loaded.config.shuffle) == (1, 4)
    assert_same(loaded.official_state_dict(), net.official_state_dict())
    broken = narrow[NORM].clone()  # NaN is not equal to NaN, yet the two copies of a parameter are
    broken[3] = torch.nan
    path = saved(narrow | {NORM: broken, TWIN: broken.clone()}, tmp_path / "a.pkl")
    assert IDM.from_checkpoint(path).official_state_dict()[NORM].isnan().nonzero().tolist() == [[3]]


# --- the published format: refusals ----------------------------------------------------------------------------------

MISFITS = {
    "missing": ({NORM: None}, [f"missing key {NORM}"]),
    "missing alpha": ({"alpha": None}, ["missing key alpha"]),
    "missing width": ({"unet.conv_in.weight": None}, ["missing key unet.conv_in.weight"]),
    "unexpected": ({"unet.mid_block.conv.weight": torch.ones(1)}, ["unexpected key unet.mid_block.conv.weight"]),
    "one key with a prefix": ({"module.alpha": torch.ones(3)}, ["unexpected key module.alpha"]),
    "wrong shape": ({NORM: torch.ones(31)}, [f"{NORM} is (31,), not (32,)"]),
    "flat convolution": ({"unet.conv_in.weight": torch.ones(32)}, ["unet.conv_in.weight is (32,)"]),
    "odd width": ({"unet.conv_in.weight": torch.ones(31, 4, 3, 3)}, ["unet.conv_in.weight", "31"]),
    "no width": ({"unet.conv_in.weight": torch.ones(0, 4, 3, 3)}, ["unet.conv_in.weight", "0"]),
    "other width": ({"unet.conv_in.weight": torch.ones(64, 4, 3, 3)}, ["unet.conv_in.bias is (32,), not (64,)"]),
    "odd channels": ({"unet.conv_in.weight": torch.ones(32, 9, 3, 3)}, ["takes 9 channels"]),
    "no steps": ({"alpha": torch.ones(0)}, ["alpha is (0,)"]),
    "scalar alpha": ({"alpha": torch.tensor(0.5)}, ["alpha is ()"]),
    "one alpha too many": ({"alpha": torch.ones(4)}, ["missing key body.3.v"]),
    "two copies": ({TWIN: torch.full((32,), 2.0)}, [NORM, TWIN, "differs"]),
    "whole numbers": ({NORM: torch.ones(32, dtype=torch.long)}, [NORM, "torch.int64"]),
    "sparse": ({NORM: torch.ones(32).to_sparse()}, [NORM, "torch.sparse_coo"]),
    "nested": ({NORM: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])}, [NORM, "torch.float32"]),
    "jagged": ({NORM: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged)}, []),
    "sub-byte": ({NORM: torch.zeros(32, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)}, [NORM, "float4"]),
    "quantized": ({NORM: torch.quantize_per_tensor(torch.ones(32), 0.1, 0, torch.qint8)}, [NORM, "qint8"]),
    "complex": ({NORM: torch.ones(32, dtype=torch.complex64)}, [NORM, "torch.complex64"]),
    "meta": ({NORM: torch.ones(32, device="meta")}, [NORM, "meta"]),
    "expanded": ({NORM: torch.ones(1).expand(2**40)}, ["expanded"]),
    "everything expanded": (dict.fromkeys(("alpha", NORM), torch.ones(1).expand(2**30)), ["expanded"]),
    "many steps": ({"alpha": torch.ones(300_000)}, ["300000 sampling steps"]),
    "strange name": ({"a\n\x1b[31m" * 1000: torch.ones(1)}, ["unexpected key a\\n\\x1b[31m"]),
    "no tensor": ({NORM: [1.0] * 32}, ["dictionary of tensors"]),
    "no name": ({7: torch.ones(32)}, ["dictionary of tensors"]),
}


@pytest.mark.parametrize(("change", "names"), MISFITS.values(), ids=MISFITS)
def test_a_file_that_does_not_fit_is_refused(narrow, change, names, tmp_path, bounded):
    path = saved({key: value for key, value in (narrow | change).items() if value is not None}, tmp_path / "a.pkl")
    refused(IDM.from_checkpoint, path, names=(path, *names))


@pytest.mark.parametrize("thing", [{}, {"alpha": "half"}, [torch.ones(3)], torch.ones(3), None, "cyclic"],
                         ids=["empty", "strings", "list", "tensor", "none", "cyclic"])
def test_a_pickle_of_something_else_is_refused(thing, tmp_path, bounded):
    if thing == "cyclic":
        thing = {}
        thing["model"] = thing
    path = saved(thing, tmp_path / "a.pkl")
    for load in (IDM.from_checkpoint, IDM.from_unet):
        refused(load, path, names=(path,))


def test_weights_of_another_kind_are_called_what_they_are(narrow, own, ldm, pipeline, tmp_path, quiet):
    state = saved(IDM.from_checkpoint(own).state_dict(), tmp_path / "state.pkl")
    refused(IDM.from_checkpoint, state, names=("missing key alpha", "a state_dict of IDM", "save_pretrained"))
    refused(IDM.from_checkpoint, saved(ldm, tmp_path / "sd.ckpt"), names=("missing key alpha", "IDM.from_unet"))
    refused(IDM.from_unet, saved(narrow, tmp_path / "idm.pkl"), names=("conv_in.weight", "IDM.from_checkpoint"))
    refused(IDM.from_unet, own, names=("IDM, not UNet2DConditionModel",))
    refused(IDM.from_checkpoint, pipeline, names=("its folder unet is meant",))
    refused(IDM.from_checkpoint, tmp_path, names=("no config.json", "but idm.pkl, sd.ckpt, state.pkl; name that file"))
    pointer = tmp_path / "net_params_50.pkl"
    pointer.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 461000000\n")
    refused(IDM.from_checkpoint, pointer, names=(pointer, "git lfs pull"))


def test_many_misfits_are_counted_and_nothing_is_copied(narrow):
    net = IDM((32, 64), 3)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    assert refused(load_official, net, {}, "file").endswith("and 1074 more")  # five of the 1,079 keys are named
    last = list(narrow)[-1]
    for bad in ({last: torch.ones(5)}, {last: narrow[last].to_sparse()}, {TWIN: narrow[TWIN] + 1},
                {"more": torch.ones(1)}):
        refused(load_official, net, narrow | bad, "file")
    refused(load_official, net, {key: tensor for key, tensor in narrow.items() if key != last}, "file")
    assert_same(dict(net.named_parameters()), before)


# --- damaged and hostile files ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_truncated_files_are_refused(narrow, zipped, tmp_path):
    path = saved(narrow, tmp_path / "a.pkl", _use_new_zipfile_serialization=zipped)
    content = path.read_bytes()
    for size in (0, 1, 2, 4, 50, 1000, 20_000, len(content) // 2, *(len(content) - cut for cut in (20_000, 100, 1))):
        path.write_bytes(content[:size])
        refused(IDM.from_checkpoint, path, names=(path,))


def test_flipped_bits_never_load_as_other_weights(narrow, tmp_path):
    path = saved(narrow, tmp_path / "a.pkl")
    content, flips = path.read_bytes(), random.Random(0)
    ends = [*range(200), *range(len(content) - 200, len(content))]  # headers, which numbers far outweigh
    loaded = 0
    for place in [flips.randrange(len(content)) for _ in range(20)] + flips.sample(ends, 30):
        damaged = bytearray(content)
        damaged[place] ^= 1 << flips.randrange(8)
        path.write_bytes(damaged)
        try:
            net = IDM.from_checkpoint(path)
        except WeightsError as error:
            assert str(path) in str(error)
        else:  # what no program reads: padding, dates, the first copy of a size
            loaded += 1
            assert_same(net.official_state_dict(), narrow)
    assert loaded < 20


@pytest.mark.parametrize("change", ["deflated", "folder"])
def test_zip_files_that_torch_would_misread_are_refused(narrow, change, tmp_path):
    whole, path = saved(narrow, tmp_path / "whole.pkl"), tmp_path / "a.pkl"
    with zipfile.ZipFile(whole) as old, zipfile.ZipFile(path, "w") as new:
        for entry in old.infolist():
            content = old.read(entry)
            largest = entry.file_size > 5_000
            entry.compress_type = zipfile.ZIP_DEFLATED if change == "deflated" and largest else zipfile.ZIP_STORED
            entry.external_attr = 0x10 if change == "folder" and largest else 0
            new.writestr(entry, content)
    refused(IDM.from_checkpoint, path, names=(path, "zip -0" if change == "deflated" else "marked as a folder"))


def test_a_pickle_runs_no_code(own, tmp_path):
    folder = tmp_path / "made"
    pickle.loads(pickle.dumps(Malicious(folder)))
    assert folder.is_dir()  # so it works where it is let
    folder.rmdir()
    path, bare = saved({"alpha": torch.ones(3), "more": Malicious(folder)}, tmp_path / "a.pkl"), tmp_path / "bare.ckpt"
    bare.write_bytes(pickle.dumps({"state_dict": Malicious(folder)}, protocol=2))
    unet = tmp_path / "unet"
    unet.mkdir()
    (unet / "config.json").write_text(json.dumps({"_class_name": "UNet2DConditionModel"}))
    (own / WEIGHTS).unlink()
    for other in (unet, own):
        shutil.copy(path, other / "diffusion_pytorch_model.bin")
    for load, source in ((IDM.from_checkpoint, path), (IDM.from_checkpoint, bare), (IDM.from_checkpoint, own),
                         (IDM.from_unet, path), (IDM.from_unet, bare), (IDM.from_unet, unet)):
        refused(load, source, names=("was refused", "run code"))
        assert not folder.exists()


def test_what_is_no_file_of_weights_is_refused(own, tmp_path, bounded):
    text, archive, pipe = tmp_path / "a.pkl", tmp_path / "b.pkl", tmp_path / "c.pkl"
    text.write_text("404: Not Found\n")
    with zipfile.ZipFile(archive, "w") as file:
        file.write(text)
    os.mkfifo(pipe)
    for load in (IDM.from_checkpoint, IDM.from_unet):
        for path in (text, archive, pipe, Path("/dev/zero")):
            refused(load, path, names=(path,))
    refused(IDM.from_checkpoint, tmp_path / "none.pkl", names=("there is no weight file", tmp_path / "none.pkl"))
    (own / "config.json").unlink()
    for make in (lambda path: os.mkfifo(path), lambda path: path.symlink_to("/dev/zero"), lambda path: path.mkdir()):
        make(own / "config.json")
        refused(IDM.from_checkpoint, own, names=(own / "config.json", "no regular file"))
        (own / "config.json").rmdir() if (own / "config.json").is_dir() else (own / "config.json").unlink()


def test_small_files_of_large_tensors_take_no_memory(narrow, tmp_path, bounded):
    """Each tensor of a network of a gigabyte is one number, or the beginning of one storage that serves them all."""
    with torch.device("meta"):
        wide = IDM((512, 1024), 3).official_state_dict()
    numbers = torch.ones(max(tensor.numel() for tensor in wide.values()))
    expanded = {key: torch.ones(1).expand(tensor.shape) for key, tensor in wide.items()}
    overlapping = {key: numbers[:tensor.numel()].view(tensor.shape) for key, tensor in wide.items()}
    for state in (expanded, overlapping):
        for legacy in (True, False):
            path = saved(state, tmp_path / "a.pkl", _use_new_zipfile_serialization=not legacy)
            refused(IDM.from_checkpoint, path, names=(path, "expanded, or share"))
    base = {"conv_in.weight": torch.ones(32 * 2**15, 4, 3, 3), "conv_out.weight": torch.ones(4, 32 * 2**15, 3, 3),
            "down_blocks.1.resnets.0.conv1.weight": torch.ones(32, 1, 3, 3)}
    refused(IDM.from_unet, saved(base, tmp_path / "a.ckpt"), names=("missing key conv_in.bias",))
    header = json.dumps({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    refused(IDM.from_checkpoint, tmp_path / "a.safetensors", names=("truncated",))
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", 90_000_000) + b"{" + b"[" * 90_000_000)
    refused(IDM.from_checkpoint, tmp_path / "a.safetensors", names=(tmp_path / "a.safetensors",))


# --- our own folders -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("settings", [{}, {"max_shard_size": "1MB"}, {"max_shard_size": "1MB", "variant": "fp16"},
                                      {"safe_serialization": False}, {"safe_serialization": False, "variant": "fp16"},
                                      {"safe_serialization": False, "max_shard_size": "1MB"}], ids=str)
def test_our_folder_comes_back_bit_for_bit(settings, tmp_path, quiet):
    net = IDM((64, 128), num_steps=2, shuffle=4, num_attention_heads=4)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    if "variant" in settings:
        net.half()
    net.save_pretrained(tmp_path / "own", **settings)
    files = [path for path in (tmp_path / "own").iterdir() if path.suffix != ".json"]
    assert len(files) > 1 if "max_shard_size" in settings else len(files) == 1
    loaded = IDM.from_checkpoint(tmp_path / "own")
    assert_same(loaded.state_dict(), net.float().state_dict())
    config = loaded.config
    assert tuple(config.block_out_channels) == (64, 128)
    assert (config.num_steps, config.shuffle, config.num_attention_heads) == (2, 4, 4)
    assert not loaded.training
    assert all(p.requires_grad for p in loaded.parameters())


def test_our_folder_by_other_names(own, tmp_path, offline, quiet):
    """A file in it, a run's folder around it, the hub's folder; of two sets of weights the one that is named."""
    net = IDM.from_checkpoint(own)
    for path in (own / WEIGHTS, IDM.from_pretrained(own)):
        found = path if isinstance(path, IDM) else IDM.from_checkpoint(path)
        assert_same(found.state_dict(), net.state_dict())
    shutil.copytree(own, tmp_path / "run" / "pretrained")
    hub = tmp_path / "models--someone--idm"
    for commit in ("1", "2"):
        shutil.copytree(own, hub / "snapshots" / commit)
    refused(IDM.from_checkpoint, hub, names=(hub, "2 snapshots"))
    (hub / "snapshots" / "1" / WEIGHTS).unlink()
    (hub / "refs").mkdir()
    (hub / "refs" / "main").write_text("2\n")
    for path in (tmp_path / "run", hub):
        assert_same(IDM.from_checkpoint(path).state_dict(), net.state_dict())
    net.half().save_pretrained(own, variant="fp16")
    half = {name: tensor.float() for name, tensor in net.state_dict().items()}
    assert_same(IDM.from_checkpoint(own / "diffusion_pytorch_model.fp16.safetensors").state_dict(), half)


def test_damaged_files_of_our_folder_are_refused(own, tmp_path):
    content = (own / WEIGHTS).read_bytes()
    for size in (0, 7, 100, len(content) // 2, len(content) - 1):
        (own / WEIGHTS).write_bytes(content[:size])
        refused(IDM.from_checkpoint, own, names=(own / WEIGHTS, "truncated"))
    (own / WEIGHTS).unlink()
    refused(IDM.from_checkpoint, own, names=(own, WEIGHTS))
    IDM((32, 64), 1).save_pretrained(tmp_path / "shards", max_shard_size="1MB")
    index, = (tmp_path / "shards").glob("*.index.json")
    first, second, *_ = sorted((tmp_path / "shards").glob("*.safetensors"))
    first.rename(tmp_path / "moved")
    refused(IDM.from_checkpoint, tmp_path / "shards", names=("there is no weight file", first))
    shutil.copy(second, first)
    refused(IDM.from_checkpoint, tmp_path / "shards", names=(second, "another file beside it holds"))
    for bad in ("1", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', '{"weight_map": {"a": "../a.safetensors"}}'):
        index.write_text(bad)
        refused(IDM.from_checkpoint, tmp_path / "shards", names=(index,))


@pytest.mark.parametrize(("change", "names"), [
    ({"steps.1.v": None}, ["missing key steps.1.v"]),
    ({"more": torch.ones(2)}, ["unexpected key more"]),
    ({"steps.1.v": torch.ones(3)}, ["steps.1.v is (3,), not (1,)"]),
    ({"schedule.alpha": torch.ones(2, dtype=torch.long)}, ["schedule.alpha", "torch.int64"]),
    ({"schedule.alpha": torch.zeros(2, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)}, ["alpha"]),
], ids=["missing", "unexpected", "shape", "integers", "sub-byte"])
def test_our_folder_with_other_tensors_is_refused(own, change, names, quiet):
    state = load_file(own / WEIGHTS) | change
    save_file({name: tensor for name, tensor in state.items() if tensor is not None}, own / WEIGHTS, {"format": "pt"})
    refused(IDM.from_checkpoint, own, names=(own, *names))


def test_weights_older_than_the_damping_mean_its_initial_values(own, narrow, tmp_path):
    state = load_file(own / WEIGHTS)
    del state["log_damping"]
    save_file(state, own / WEIGHTS, {"format": "pt"})
    published = IDM.from_checkpoint(saved(narrow, tmp_path / "a.pkl"))
    for net in (IDM.from_checkpoint(own), IDM.from_pretrained(own), published):
        assert torch.allclose(net.log_damping.exp(), torch.full((net.config.num_steps,), 25.0))
    assert len(published.official_state_dict()) == len(narrow)
    torch.nn.init.constant_(published.log_damping, 1.0)
    assert not published.fits_official_format
    with pytest.raises(ValueError, match="published format has no damping, and this network's was trained with noise"):
        published.official_state_dict()


@pytest.mark.parametrize(("config", "names"), [
    (None, ["there is no config.json"]),
    ("{", ["config.json cannot be read"]),
    ("[1]", ["unnamed model"]),
    (b"\xff\xfe\x00", ["config.json cannot be read"]),
    ("[" * 1_000_000, ["config.json cannot be read"]),
    (" " * 5_000_000, ["config.json cannot be read", "larger"]),
    ({"_class_name": "UNet2DConditionModel"}, ["UNet2DConditionModel, not IDM"]),
    *[({"_class_name": "IDM", "block_out_channels": [32, 64], "num_steps": 2} | change, names) for change, names in (
        ({"block_out_channels": [31, 64]}, ["config.json", "31"]),
        ({"block_out_channels": 5}, ["config.json"]),
        ({"block_out_channels": [[32], "64"]}, ["config.json"]),
        ({"block_out_channels": [2**40, 2**40]}, ["config.json"]),
        ({"block_out_channels": [1e300, 1e300]}, ["config.json"]),
        ({"block_out_channels": [320000, 640000]}, ["unet.conv_in.bias is (32,), not (320000,)"]),
        ({"num_steps": 3}, ["schedule.alpha is (2,), not (3,)", "missing key"]),
        ({"num_steps": 300_000}, ["300000 sampling steps"]),
        ({"num_steps": 3e5}, ["config.json"]),
        ({"num_steps": float("inf")}, ["config.json"]),
        ({"num_steps": "2"}, ["config.json"]),
        ({"shuffle": 2**40}, ["config.json"]),
        ({"num_attention_heads": 2**70}, ["config.json"]),
        ({"norm_groups": None}, ["config.json"]),
    )],
])
def test_our_folder_with_another_config_is_refused(own, config, names, bounded):
    (own / "config.json").unlink()
    if config is not None:
        text = json.dumps(config) if isinstance(config, dict) else config
        (own / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    refused(IDM.from_checkpoint, own, names=(own, *names))


# --- base models -----------------------------------------------------------------------------------------------------

def small_unet(**changes) -> UNet2DConditionModel:
    """Stable Diffusion v1's U-Net with a tenth of its width."""
    cross = "CrossAttn{}Block2D"
    config = {
        "sample_size": 8, "in_channels": 4, "out_channels": 4, "layers_per_block": 2,
        "block_out_channels": (32, 64, 128, 128), "cross_attention_dim": 32, "attention_head_dim": 8,
        "down_block_types": (*[cross.format("Down")] * 3, "DownBlock2D"),
        "up_block_types": ("UpBlock2D", *[cross.format("Up")] * 3),
    }
    torch.manual_seed(0)
    return UNet2DConditionModel(**config | changes)


@pytest.fixture(scope="module")
def unet() -> UNet2DConditionModel:
    return small_unet()


@pytest.fixture(scope="module")
def pipeline(unet, tmp_path_factory) -> Path:
    """As much of a Stable Diffusion pipeline's folder as is asked for, written by diffusers."""
    folder = tmp_path_factory.mktemp("stable-diffusion")
    unet.save_pretrained(folder / "unet")
    AutoencoderKL(block_out_channels=(32, 32), down_block_types=("DownEncoderBlock2D",) * 2,
                  up_block_types=("UpDecoderBlock2D",) * 2).save_pretrained(folder / "vae")
    (folder / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    return folder


def assert_built_on(net: IDM, unet: UNet2DConditionModel, rounding=lambda tensor: tensor) -> None:
    """What Stable Diffusion has is Stable Diffusion's; the rest has the published initial values."""
    state = {name: parameter.detach() for name, parameter in official_names(net)}
    base, compared = unet.state_dict(), 0
    assert list(state) == [key for key, _ in PUBLISHED_SHAPES]
    for key, tensor in state.items():
        leaf = key.rsplit(".", 1)[-1]
        if leaf in ("v", "alpha"):
            assert (tensor == 0.5).all(), key
        elif leaf == "input_help_scale_factor":
            assert (tensor == 1).all(), key
        elif leaf.startswith("merge_scale_factor"):
            assert (tensor == 0).all(), key
        elif "f2i" in key or "i2f" in key:  # PyTorch's default: uniform within 1/sqrt(inputs)
            inputs = state[key.removesuffix("bias").removesuffix("weight") + "weight"].shape[1]
            assert 0 < tensor.abs().max() <= inputs**-0.5, key
        elif "rev_module_list" not in key:
            name = re.sub(r"^up_blocks\.(\d)", lambda m: f"up_blocks.{int(m[1]) + 2}", key.removeprefix("unet."))
            assert torch.equal(tensor, rounding(base[name])), key
            compared += 1
    # conv_in, conv_norm_out, conv_out; 10 attentions of 19 tensors; 10 resnets of 8, and 7 shortcuts; 2 resamplers
    assert compared == 6 + 10 * 19 + 10 * 8 + 7 * 2 + 2 * 2


@pytest.mark.parametrize("part", [".", "unet"])
def test_a_pipelines_folder(pipeline, unet, part, quiet, offline):
    net = IDM.from_unet(pipeline / part, num_steps=3)
    assert tuple(net.config.block_out_channels) == (32, 64)
    assert (net.config.num_steps, net.config.shuffle, net.config.num_attention_heads) == (3, 2, 8)
    assert_built_on(net, unet)


def test_both_copies_are_of_the_base_model(pipeline, tmp_path):
    """The twins in chains too, and then through a published file: the same network, to the last bit."""
    net = IDM.from_unet(str(pipeline)).eval()
    state = net.official_state_dict()
    assert all(torch.equal(state[key], state[name]) for key, name in Golden("narrow_T3").key_parameter.items())
    torch.save(state, tmp_path / "a.pkl")
    operator = BlockCompressedSensing.random((32, 32), 0.25, 8, torch.Generator().manual_seed(0))
    y = operator.A(torch.rand(1, 1, 32, 32, generator=torch.Generator().manual_seed(1)))
    with torch.no_grad():
        x_hat = net(y, operator)
        again = IDM.from_checkpoint(tmp_path / "a.pkl")(y, operator)
    assert x_hat.isfinite().all() and x_hat.std() > 0.01
    assert torch.equal(x_hat, again)


def test_other_heads_and_other_files_of_a_unet(tmp_path, quiet, offline):
    four = small_unet(attention_head_dim=4)
    four.save_pretrained(tmp_path / "bin", safe_serialization=False)
    net = IDM.from_unet(tmp_path / "bin", num_steps=3)
    assert net.config.num_attention_heads == 4
    assert_built_on(net, four)
    with pytest.raises(ValueError, match="means num_attention_heads 8, not 4; use"):  # else read as another
        net.official_state_dict()
    four.half().save_pretrained(tmp_path / "half", variant="fp16")
    assert_built_on(IDM.from_unet(tmp_path / "half"), four, Tensor.float)
    assert_built_on(IDM.from_unet(tmp_path / "half" / "diffusion_pytorch_model.fp16.safetensors"), four, Tensor.float)


def ldm_name(name: str) -> str:
    """Original Stable Diffusion's name of diffusers' parameter, which counts layers along the whole path."""
    parts = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
             "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}
    fixed = {"conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
             "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2"}
    module, leaf = name.rsplit(".", 1)
    if module in fixed:
        return f"model.diffusion_model.{fixed[module]}.{leaf}"
    pattern = r"(down|mid|up)_block(?:s\.(\d))?\.(\w+)\.(\d)\.(.+)"
    side, block, kind, layer, rest = re.fullmatch(pattern, name).groups()
    block, layer = int(block or 0), int(layer)
    if kind == "resnets":
        rest = re.sub(r"^\w+", lambda m: parts[m[0]], rest)
    if side == "mid":
        place = f"middle_block.{1 if kind == 'attentions' else 2 * layer}"
    elif side == "down":
        place = f"input_blocks.{3 * block + 3}.0" if kind == "downsamplers" else f"input_blocks.{3 * block + layer + 1}"
        rest = rest.replace("conv.", "op.") if kind == "downsamplers" else rest
    else:
        layer = 2 if kind == "upsamplers" else layer
        place = f"output_blocks.{3 * block + layer}"
    place += {"resnets": ".0", "attentions": ".1", "downsamplers": "",
              "upsamplers": ".1" if block == 0 else ".2"}[kind] if side != "mid" else ""
    return f"model.diffusion_model.{place}.{rest}"


@pytest.fixture(scope="module")
def ldm(unet) -> dict[str, Tensor]:
    """The one-file layout, with a little of all that a full file has beside the U-Net."""
    state = {ldm_name(name): tensor for name, tensor in unet.state_dict().items()}
    assert len(state) == len(unet.state_dict()) == 686  # as many as v1.5 has, of which these are some
    assert {f"model.diffusion_model.{name}" for name in (
        "input_blocks.1.0.in_layers.0.weight", "input_blocks.3.0.op.weight", "middle_block.1.proj_in.weight",
        "input_blocks.4.0.skip_connection.weight", "output_blocks.2.1.conv.weight", "output_blocks.8.2.conv.bias",
        "output_blocks.11.1.transformer_blocks.0.attn1.to_q.weight")} <= state.keys()
    return state | {
        "first_stage_model.encoder.conv_in.weight": torch.ones(8, 3, 3, 3),
        "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(77)[None],
        "betas": torch.ones(1000),
        **{f"model_ema.diffusion_model{i}": torch.ones(1) for i in range(120)},
    }


@pytest.mark.parametrize("end", [".safetensors", ".ckpt", "flat.ckpt", "unet.ckpt", "module.ckpt", "misnamed.ckpt"])
def test_a_one_file_checkpoint(ldm, unet, end, tmp_path, quiet, offline):
    path = tmp_path / f"v1-5{end}"
    variants = {
        ".ckpt": {"state_dict": ldm, "global_step": 7},
        "unet.ckpt": {name: tensor for name, tensor in ldm.items() if name.startswith("model.diffusion_model.")},
        "module.ckpt": {"module." + name: tensor for name, tensor in ldm.items()},
    }
    saved(variants.get(end, ldm), path if end != "misnamed.ckpt" else path.with_suffix(".safetensors"))
    if end == "misnamed.ckpt":
        path.with_suffix(".safetensors").rename(path)
    net = IDM.from_unet(path)
    assert_built_on(net, unet)
    assert net.config.num_attention_heads == 8


def test_of_a_one_file_checkpoint_only_what_is_copied_is_read(tmp_path):
    """A file's tensors are mapped: they take no memory of their own."""
    state = {"conv_in.weight": torch.ones(1_000_000), "more": torch.ones(30_000_000)}
    save_file(state, tmp_path / "a.safetensors")
    torch.save(state, tmp_path / "a.ckpt")
    for name in ("a.safetensors", "a.ckpt"):
        before = _anonymous_memory()
        tensors, _ = read_base_unet(tmp_path / name)
        assert tensors["conv_in.weight"].sum() == 1_000_000
        assert _anonymous_memory() - before < 60_000_000, name  # the unread tensor is 120 MB
        del tensors


def _anonymous_memory() -> int:
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        pytest.skip("memory is read from /proc")
    return int(re.search(r"RssAnon:\s+(\d+)", status)[1]) * 1024


def test_a_one_file_checkpoint_with_a_gap_is_refused(ldm, tmp_path):
    for key in ("output_blocks.8.2.conv.bias", "input_blocks.0.0.weight", "output_blocks.11.1.proj_in.weight"):
        state = {name: tensor for name, tensor in ldm.items() if name != f"model.diffusion_model.{key}"}
        refused(IDM.from_unet, saved({"state_dict": state}, tmp_path / "a.ckpt"), names=(tmp_path, "missing key"))


def test_what_is_no_base_model_is_refused(pipeline, tmp_path, quiet, offline):
    for nothing in ("nonsense", "/nowhere/at/all", tmp_path / "none.safetensors"):
        refused(IDM.from_unet, nothing, names=(nothing, "neither a file, nor a folder, nor a hub id"))
    refused(IDM.from_unet, pipeline / "vae", names=(pipeline / "vae", "AutoencoderKL, not UNet2DConditionModel"))
    vae = pipeline / "vae" / WEIGHTS
    refused(IDM.from_unet, vae, names=(vae, "missing key conv_in.weight"))
    (tmp_path / "a.safetensors").write_text("404: Not Found")
    refused(IDM.from_unet, tmp_path / "a.safetensors", names=(tmp_path / "a.safetensors", "cannot be read"))
    for thing in ({"state_dict": 3}, {"state_dict": {7: 1}}, {"conv_in.weight": "x"}):
        refused(IDM.from_unet, saved(thing, tmp_path / "a.ckpt"), names=(tmp_path / "a.ckpt",))


@pytest.mark.parametrize(("changes", "names"), [
    ({"in_channels": 9}, ["takes 9 channels and gives 4", "inpainting"]),
    ({"in_channels": 5, "out_channels": 5}, ["takes 5 channels"]),
    ({"attention_head_dim": (2, 4, 8, 8)}, ["attention heads ([2, 4, 8, 8])", "Stable Diffusion 2"]),
    ({"attention_head_dim": 5, "block_out_channels": (32, 64, 160, 160)}, ["5 attention heads"]),
    ({"use_linear_projection": True}, ["attentions.0.proj_in.weight is (32, 32), not (32, 32, 1, 1)"]),
    ({"layers_per_block": 1}, ["layers_per_block is 1, not 2"]),
    ({"norm_num_groups": 16}, ["norm_num_groups is 16, not 32"]),
    ({"act_fn": "gelu"}, ["act_fn is gelu, not silu"]),
], ids=["inpainting", "five channels", "heads", "five heads", "linear", "layers", "groups", "activation"])
def test_other_unets_are_refused(changes, names, tmp_path, quiet, offline):
    unet = small_unet() if "attention_head_dim" in changes else small_unet(**changes)
    unet.register_to_config(**changes)  # heads change no shape
    unet.save_pretrained(tmp_path / "unet")
    refused(IDM.from_unet, tmp_path, names=(tmp_path, *names))


def test_a_unet_that_lacks_something_is_refused(pipeline, tmp_path, quiet, offline):
    shutil.copytree(pipeline / "unet", tmp_path / "unet")
    state = load_file(tmp_path / "unet" / WEIGHTS)
    for name in ("conv_in.weight", "up_blocks.3.resnets.2.conv2.bias"):
        save_file({n: t for n, t in state.items() if n != name}, tmp_path / "unet" / WEIGHTS)
        refused(IDM.from_unet, tmp_path, names=(tmp_path, f"missing key {name}"))
    (tmp_path / "unet" / WEIGHTS).write_bytes((tmp_path / "unet" / WEIGHTS).read_bytes()[:5000])
    refused(IDM.from_unet, tmp_path, names=(tmp_path, "truncated"))


# --- the hub ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("settings", [{}, {"variant": "fp16"}, {"safe_serialization": False},
                                      {"variant": "fp16", "safe_serialization": False}, {"max_shard_size": "5MB"}],
                         ids=str)
def test_a_hub_id_in_the_cache_alone(unet, settings, tmp_path, quiet, offline):
    """Whatever the cache has of it: full or half precision, safetensors or pickle, one file or several."""
    repository = offline / "models--someone--stable-diffusion"
    shutil.copytree(saved_unet(unet, tmp_path / "unet", settings), repository / "snapshots" / "0123abc" / "unet")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123abc")
    rounding = (lambda tensor: tensor.half().float()) if "variant" in settings else lambda tensor: tensor
    for source in ("someone/stable-diffusion", repository):
        assert_built_on(IDM.from_unet(source), unet, rounding)
    for path in (repository / "snapshots" / "0123abc" / "unet").glob("*model*"):
        path.unlink()
    refused(IDM.from_unet, "someone/stable-diffusion", names=("someone/stable-diffusion", "network"))
    refused(IDM.from_unet, repository, names=(repository, "holds no weights"))


def saved_unet(unet: UNet2DConditionModel, folder: Path, settings: dict) -> Path:
    copy = small_unet()
    copy.load_state_dict(unet.state_dict())
    (copy.half() if "variant" in settings else copy).save_pretrained(folder, **settings)
    return folder


@pytest.mark.parametrize("source", ["stable-diffusion-v1-5/stable-diffusion-v1-5", "weight/misspelt"])
def test_a_hub_id_without_network_is_refused(source, quiet, offline):
    message = refused(IDM.from_unet, source, names=(source, "no file or folder here", "network", "spelling"))
    assert "Traceback" not in message


class Hub(BaseHTTPRequestHandler):
    """As much of a hub as is asked for files: what `folder` holds under someone/stable-diffusion."""

    def do_GET(self):
        prefix = "/someone/stable-diffusion/resolve/main/"
        path = self.folder / self.path.removeprefix(prefix)
        self.asked.append(path.name)
        there = self.path.startswith(prefix) and path.is_file()
        content = path.read_bytes() if there else b""
        self.send_response(200 if there else 404)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("ETag", f'"{sha256(content).hexdigest()}"')
        if not there:
            self.send_header("X-Error-Code", "EntryNotFound")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    do_HEAD = do_GET

    def log_message(self, *args):
        pass


@pytest.mark.parametrize("settings", [{}, {"variant": "fp16"}, {"max_shard_size": "5MB"}], ids=str)
def test_a_hub_id_is_downloaded_once_and_what_changes_in_the_cache_is_noticed(unet, settings, tmp_path, monkeypatch):
    saved_unet(unet, tmp_path / "repository" / "unet", settings)
    handler = type("Handler", (Hub,), {"folder": tmp_path / "repository", "asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE",
                        address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    try:
        rounding = (lambda tensor: tensor.half().float()) if "variant" in settings else lambda tensor: tensor
        assert_built_on(IDM.from_unet("someone/stable-diffusion"), unet, rounding)
    finally:
        server.shutdown()
        server.server_close()
    assert sum(name.endswith(".bin") for name in handler.asked) == 0
    unet_folder = tmp_path / "hub" / "models--someone--stable-diffusion" / "snapshots" / ("0" * 40) / "unet"
    first = sorted(unet_folder.glob("*.safetensors"))[0]
    content = bytearray(first.read_bytes())
    content[-1] ^= 1
    first.resolve().chmod(0o644)
    first.resolve().write_bytes(content)
    refused(IDM.from_unet, unet_folder, names=(first, "SHA-256"))


@pytest.mark.parametrize("setting", [{"a\n\x1b[31m": 1}, {"coupling": "a\n\x1b[31m"}, {"_class_name": "a\n\x1b[31m"},
                                     {"attention_window": {"a\n\x1b[31m": 1}}])
def test_a_terminal_obeys_nothing_in_a_config(tmp_path, setting):
    IDM.compact(32, 1, shuffle=2).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | setting))
    refused(IDM.from_checkpoint, tmp_path, names=("\\x1b[31m",))
