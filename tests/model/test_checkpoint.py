"""Weights in and out, against the published key list, the golden cases and diffusers' own U-Net; and every refusal."""
import json
import logging
import os
import pickle
import re
import shutil
import socket
import warnings
from pathlib import Path

import huggingface_hub
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from model import IDM, BlockCompressedSensing, WeightsError
from model.checkpoint import load_base_unet, load_official, official_names, read_base_unet
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
    assert "\n" not in message
    for name in names:
        assert str(name) in message
    return message


class Malicious:
    """Unpickled, it makes a folder."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


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
    assert sum(p.numel() for p in parameters.values()) == 115_265_799
    injectors = [p for name, p in parameters.items() if re.search(r"\.(lift|unlift)\.", name)]
    assert sum(p.numel() for p in injectors) == 18_060


@pytest.mark.parametrize("variant", ["as published", "module.", "legacy"])
def test_a_published_file_loads_and_computes_what_the_published_code_does(golden, variant, tmp_path, quiet):
    path = tmp_path / "net_params_50.pkl"
    state = golden.state_dict()
    prefix = "module." if variant == "module." else ""
    torch.save({prefix + key: tensor for key, tensor in state.items()}, path,
               _use_new_zipfile_serialization=variant != "legacy")
    net = IDM.from_checkpoint(path)
    assert tuple(net.config.block_out_channels) == tuple(golden.meta["block_out_channels"][:2])
    assert (net.config.num_steps, net.config.shuffle) == (golden.meta["num_steps"], 2)
    assert net.config.num_attention_heads == golden.meta["attention_heads"]
    assert not net.training
    with torch.no_grad():
        assert (net(golden.y, golden.operator()) - golden.x_hat).abs().max() <= 1e-4
    torch.save(net.official_state_dict(), path)
    assert_same(torch.load(path, weights_only=True), state)


def test_both_names_of_a_parameter_share_memory_in_the_file(narrow, tmp_path):
    torch.save(narrow, tmp_path / "a.pkl")
    net = IDM.from_checkpoint(tmp_path / "a.pkl")
    torch.save(net.official_state_dict(), tmp_path / "b.pkl")
    numbers = sum(p.numel() for p in net.parameters())
    assert numbers * 4 < (tmp_path / "b.pkl").stat().st_size < numbers * 4 * 1.3  # 1079 small records and their names


def test_numbers_stored_in_half_precision_load_as_fp32(narrow, tmp_path):
    halves = {key: tensor.half() for key, tensor in narrow.items()}
    torch.save(halves, tmp_path / "a.pkl")
    loaded = IDM.from_checkpoint(tmp_path / "a.pkl").official_state_dict()
    assert_same(loaded, {key: tensor.float() for key, tensor in halves.items()})


def test_shuffle_is_read_off_the_weights(tmp_path):
    net = IDM((64, 128), num_steps=1, shuffle=4)
    torch.save(net.official_state_dict(), tmp_path / "a.pkl")
    loaded = IDM.from_checkpoint(tmp_path / "a.pkl")
    assert (loaded.config.num_steps, loaded.config.shuffle) == (1, 4)
    assert_same(loaded.official_state_dict(), net.official_state_dict())


def test_a_diverged_network_loads(narrow, tmp_path):
    """NaN is not equal to NaN, yet the two copies of a parameter are."""
    broken = narrow[NORM].clone()
    broken[3] = torch.nan
    torch.save(narrow | {NORM: broken, TWIN: broken.clone()}, tmp_path / "a.pkl")
    loaded = IDM.from_checkpoint(tmp_path / "a.pkl").official_state_dict()[NORM]
    assert loaded.isnan().nonzero().tolist() == [[3]]


# --- the published format: refusals ----------------------------------------------------------------------------------

@pytest.fixture
def narrow() -> dict[str, Tensor]:
    """The published state_dict of the narrow golden case."""
    return Golden("narrow_T3").state_dict()


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
    "no tensor": ({NORM: [1.0] * 32}, ["dictionary of tensors"]),
    "no name": ({7: torch.ones(32)}, ["dictionary of tensors"]),
}


@pytest.mark.parametrize(("change", "names"), MISFITS.values(), ids=MISFITS)
def test_a_file_that_does_not_fit_is_refused(narrow, change, names, tmp_path):
    path = tmp_path / "a.pkl"
    torch.save({key: value for key, value in (narrow | change).items() if value is not None}, path)
    refused(IDM.from_checkpoint, path, names=(path, *names))


@pytest.mark.parametrize("thing", [{}, {"alpha": "half"}, [torch.ones(3)], torch.ones(3), None],
                         ids=["empty", "strings", "list", "tensor", "none"])
def test_a_pickle_of_something_else_is_refused(thing, tmp_path):
    torch.save(thing, tmp_path / "a.pkl")
    refused(IDM.from_checkpoint, tmp_path / "a.pkl", names=(tmp_path / "a.pkl",))


def test_many_misfits_are_counted(narrow):
    net = IDM((32, 64), 3)
    message = refused(load_official, net, {}, "file")
    assert message.endswith("and 1074 more")  # five of the 1,079 keys are named


def test_nothing_is_copied_of_a_file_that_does_not_fit(narrow):
    net = IDM((32, 64), 3)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    last = list(narrow)[-1]
    for bad in ({last: torch.ones(5)}, {last: narrow[last].to_sparse()}, {TWIN: narrow[TWIN] + 1},
                {"more": torch.ones(1)}):
        refused(load_official, net, narrow | bad, "file")
    refused(load_official, net, {key: tensor for key, tensor in narrow.items() if key != last}, "file")
    assert_same(dict(net.named_parameters()), before)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_truncated_files_are_refused(narrow, zipped, tmp_path):
    path = tmp_path / "a.pkl"
    torch.save(narrow, path, _use_new_zipfile_serialization=zipped)
    whole = path.read_bytes()
    for cut in (0, 1, 2, 4, 50, 1000, 20_000, len(whole) // 2, len(whole) - 20_000, len(whole) - 100, len(whole) - 1):
        path.write_bytes(whole[:cut])
        refused(IDM.from_checkpoint, path, names=(path,))
    path.write_bytes(whole)
    IDM.from_checkpoint(path)


def test_what_is_no_checkpoint_is_refused(tmp_path):
    text, archive = tmp_path / "a.pkl", tmp_path / "b.pkl"
    text.write_text("404: Not Found\n")
    refused(IDM.from_checkpoint, text, names=(text,))
    shutil.make_archive(str(tmp_path / "b"), "zip", tmp_path)
    (tmp_path / "b.zip").rename(archive)
    refused(IDM.from_checkpoint, archive, names=(archive,))
    refused(IDM.from_checkpoint, tmp_path / "none.pkl", names=("there is no weight file", tmp_path / "none.pkl"))


def test_a_pickle_runs_no_code(tmp_path):
    folder = tmp_path / "made"
    pickle.loads(pickle.dumps(Malicious(folder)))
    assert folder.is_dir()  # so it works where it is let
    folder.rmdir()
    path, bare = tmp_path / "a.pkl", tmp_path / "bare.ckpt"
    torch.save({"alpha": torch.ones(3), "more": Malicious(folder)}, path)
    bare.write_bytes(pickle.dumps({"state_dict": Malicious(folder)}, protocol=2))
    unet = tmp_path / "unet"
    unet.mkdir()
    (unet / "config.json").write_text(json.dumps({"_class_name": "UNet2DConditionModel"}))
    shutil.copy(path, unet / "diffusion_pytorch_model.bin")
    own = tmp_path / "own"
    IDM((32, 64), 1).save_pretrained(own)
    (own / WEIGHTS).unlink()
    shutil.copy(path, own / "diffusion_pytorch_model.bin")
    for load, source in ((IDM.from_checkpoint, path), (IDM.from_checkpoint, bare), (IDM.from_checkpoint, own),
                         (IDM.from_unet, path), (IDM.from_unet, bare), (IDM.from_unet, unet)):
        refused(load, source, names=("was refused", "run code"))
        assert not folder.exists()


# --- our own folders -------------------------------------------------------------------------------------------------

@pytest.fixture
def own(tmp_path) -> Path:
    torch.manual_seed(0)
    IDM((32, 64), num_steps=2).save_pretrained(tmp_path / "own")
    return tmp_path / "own"


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
@pytest.mark.parametrize("load", [IDM.from_pretrained, IDM.from_checkpoint], ids=["from_pretrained", "from_checkpoint"])
def test_our_folder_comes_back_bit_for_bit(load, safe, tmp_path):
    net = IDM((64, 128), num_steps=2, shuffle=4, num_attention_heads=4)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    net.save_pretrained(tmp_path / "own", safe_serialization=safe)
    loaded = load(tmp_path / "own")
    assert_same(loaded.state_dict(), net.state_dict())
    config = loaded.config
    assert tuple(config.block_out_channels) == (64, 128)
    assert (config.num_steps, config.shuffle, config.num_attention_heads) == (2, 4, 4)
    assert not loaded.training
    assert all(p.requires_grad for p in loaded.parameters())


def test_our_folder_loads_without_a_word(own, quiet, offline):
    IDM.from_checkpoint(own)


def test_our_folder_in_half_precision_loads_as_fp32(own, tmp_path):
    halves = IDM.from_checkpoint(own).half()
    halves.save_pretrained(tmp_path / "half")
    expected = {name: tensor.float() for name, tensor in halves.state_dict().items()}
    assert_same(IDM.from_checkpoint(tmp_path / "half").state_dict(), expected)
    halves.save_pretrained(tmp_path / "variant", variant="fp16")
    assert_same(IDM.from_checkpoint(tmp_path / "variant").state_dict(), expected)


def test_half_a_safetensors_file_is_refused(own):
    whole = (own / WEIGHTS).read_bytes()
    for cut in (0, 7, 100, len(whole) // 2, len(whole) - 1):
        (own / WEIGHTS).write_bytes(whole[:cut])
        refused(IDM.from_checkpoint, own, names=(own / WEIGHTS, "truncated"))


@pytest.mark.parametrize(("change", "names"), [
    ({"steps.1.v": None}, ["missing key steps.1.v"]),
    ({"more": torch.ones(2)}, ["unexpected key more"]),
    ({"steps.1.v": torch.ones(3)}, ["steps.1.v is (3,), not (1,)"]),
    ({"schedule.alpha": torch.ones(2, dtype=torch.long)}, ["schedule.alpha", "torch.int64"]),
], ids=["missing", "unexpected", "shape", "integers"])
def test_our_folder_with_other_tensors_is_refused(own, change, names, quiet):
    state = load_file(own / WEIGHTS) | change
    save_file({name: tensor for name, tensor in state.items() if tensor is not None}, own / WEIGHTS, {"format": "pt"})
    refused(IDM.from_checkpoint, own, names=(own, *names))


@pytest.mark.parametrize(("config", "names"), [
    (None, ["there is no config.json"]),
    ("{", ["config.json cannot be read"]),
    ("[1]", ["unnamed model"]),
    (b"\xff\xfe\x00", ["config.json cannot be read"]),
    ({"_class_name": "UNet2DConditionModel"}, ["UNet2DConditionModel, not IDM"]),
    ({"_class_name": "IDM", "block_out_channels": [31, 64]}, ["config.json", "31"]),
    ({"_class_name": "IDM", "block_out_channels": 5}, ["config.json"]),
    ({"_class_name": "IDM", "block_out_channels": [32, 64], "num_steps": 3},
     ["schedule.alpha is (2,), not (3,)", "missing key"]),
    ({"_class_name": "IDM", "block_out_channels": [320000, 640000]},  # for which there is no memory
     ["unet.conv_in.bias is (32,), not (320000,)"]),
])
def test_our_folder_with_another_config_is_refused(own, config, names):
    (own / "config.json").unlink()
    if config is not None:
        text = json.dumps(config) if isinstance(config, dict) else config
        (own / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    refused(IDM.from_checkpoint, own, names=(own, *names))


def test_our_folder_without_weights_is_refused(own):
    (own / WEIGHTS).unlink()
    refused(IDM.from_checkpoint, own, names=(own, WEIGHTS))


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
    """A Stable Diffusion pipeline's folder, written by diffusers."""
    place = tmp_path_factory.mktemp("stable-diffusion")
    tokens = ["a", "a</w>", "aa</w>", "<|startoftext|>", "<|endoftext|>"]
    (place / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (place / "merges.txt").write_text("#version: 0.2\na a</w>\n")
    text = CLIPTextConfig(vocab_size=len(tokens), hidden_size=32, intermediate_size=32, num_hidden_layers=1,
                          num_attention_heads=2, bos_token_id=3, eos_token_id=4, pad_token_id=4)
    vae = AutoencoderKL(block_out_channels=(32, 32), down_block_types=("DownEncoderBlock2D",) * 2,
                        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4)
    StableDiffusionPipeline(
        vae=vae, text_encoder=CLIPTextModel(text), unet=unet,
        tokenizer=CLIPTokenizer(str(place / "vocab.json"), str(place / "merges.txt")),
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(place / "pipeline")
    return place / "pipeline"


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
    with pytest.raises(ValueError, match="means 8 attention heads and 32 groups, not 4 and 32"):  # else read as another
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
    assert len(state) == len(unet.state_dict()) == 686  # as many as v1.5 has
    return state | {
        "first_stage_model.encoder.conv_in.weight": torch.ones(8, 3, 3, 3),
        "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(77)[None],
        "betas": torch.ones(1000),
        **{f"model_ema.diffusion_model{i}": torch.ones(1) for i in range(120)},
    }


def test_the_layout_of_one_file_checkpoints():
    """Some names of sd-v1-5's own file, against the map above."""
    for name, expected in {
        "down_blocks.0.resnets.0.norm1.weight": "input_blocks.1.0.in_layers.0.weight",
        "down_blocks.0.downsamplers.0.conv.weight": "input_blocks.3.0.op.weight",
        "down_blocks.1.resnets.0.conv_shortcut.weight": "input_blocks.4.0.skip_connection.weight",
        "mid_block.attentions.0.proj_in.weight": "middle_block.1.proj_in.weight",
        "up_blocks.0.upsamplers.0.conv.weight": "output_blocks.2.1.conv.weight",
        "up_blocks.2.upsamplers.0.conv.bias": "output_blocks.8.2.conv.bias",
        "up_blocks.3.attentions.2.transformer_blocks.0.attn1.to_q.weight":
            "output_blocks.11.1.transformer_blocks.0.attn1.to_q.weight",
    }.items():
        assert ldm_name(name) == "model.diffusion_model." + expected


@pytest.mark.parametrize("end", [".safetensors", ".ckpt", "flat.ckpt"])
def test_a_one_file_checkpoint(ldm, unet, end, tmp_path, quiet, offline):
    path = tmp_path / f"v1-5{end}"
    if end == ".safetensors":
        save_file(ldm, path)
    else:
        torch.save(ldm if end == "flat.ckpt" else {"state_dict": ldm, "global_step": 7}, path)
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


@pytest.mark.parametrize("key", ["output_blocks.8.2.conv.bias", "input_blocks.3.0.op.bias", "input_blocks.0.0.weight",
                                 "output_blocks.11.1.proj_in.weight", "input_blocks.1.0.in_layers.0.weight"])
def test_a_one_file_checkpoint_with_a_gap_is_refused(ldm, key, tmp_path):
    state = {name: tensor for name, tensor in ldm.items() if name != f"model.diffusion_model.{key}"}
    torch.save({"state_dict": state}, tmp_path / "a.ckpt")
    refused(IDM.from_unet, tmp_path / "a.ckpt", names=(tmp_path / "a.ckpt", "missing key"))


def test_a_hub_id_in_the_cache(pipeline, unet, quiet, offline):
    repository = offline / "models--someone--stable-diffusion"
    shutil.copytree(pipeline / "unet", repository / "snapshots" / "0123abc" / "unet")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123abc")
    assert_built_on(IDM.from_unet("someone/stable-diffusion"), unet)
    (repository / "snapshots" / "0123abc" / "unet" / WEIGHTS).unlink()
    refused(IDM.from_unet, "someone/stable-diffusion", names=("someone/stable-diffusion", "network"))


@pytest.mark.parametrize("source", ["stable-diffusion-v1-5/stable-diffusion-v1-5", "weight/misspelt"])
def test_a_hub_id_without_network_is_refused(source, quiet, offline):
    message = refused(IDM.from_unet, source, names=(source, "no file or folder here", "network", "spelling"))
    assert "Traceback" not in message


def test_what_is_no_base_model_is_refused(pipeline, tmp_path, quiet, offline):
    for nothing in ("nonsense", "/nowhere/at/all", tmp_path / "none.safetensors"):
        refused(IDM.from_unet, nothing, names=(nothing, "neither a file, nor a folder, nor a hub id"))
    refused(IDM.from_unet, pipeline / "vae", names=(pipeline / "vae", "AutoencoderKL, not UNet2DConditionModel"))
    refused(IDM.from_unet, pipeline / "tokenizer", names=(pipeline / "tokenizer", "no config.json"))
    vae = pipeline / "vae" / WEIGHTS
    refused(IDM.from_unet, vae, names=(vae, "missing key conv_in.weight"))
    (tmp_path / "a.safetensors").write_text("404: Not Found")
    refused(IDM.from_unet, tmp_path / "a.safetensors", names=(tmp_path / "a.safetensors", "cannot be read"))
    for thing in ([1], {"state_dict": 3}, {"state_dict": {7: 1}}, {"conv_in.weight": "x"}):
        torch.save(thing, tmp_path / "a.ckpt")
        refused(IDM.from_unet, tmp_path / "a.ckpt", names=(tmp_path / "a.ckpt",))
    refused(IDM.from_unet, tmp_path / "a.bin", names=(tmp_path / "a.bin", "neither"))


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


def test_a_unet_with_a_missing_tensor_is_refused(pipeline, tmp_path, quiet, offline):
    shutil.copytree(pipeline / "unet", tmp_path / "unet")
    state = load_file(tmp_path / "unet" / WEIGHTS)
    for name in ("conv_in.weight", "up_blocks.3.resnets.2.conv2.bias"):
        save_file({n: t for n, t in state.items() if n != name}, tmp_path / "unet" / WEIGHTS)
        refused(IDM.from_unet, tmp_path, names=(tmp_path, f"missing key {name}"))
    (tmp_path / "unet" / WEIGHTS).write_bytes((tmp_path / "unet" / WEIGHTS).read_bytes()[:5000])
    refused(IDM.from_unet, tmp_path, names=(tmp_path, "truncated"))


def test_nothing_is_copied_of_a_unet_that_does_not_fit(unet):
    net = IDM((32, 64), 1)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    refused(load_base_unet, net, unet.state_dict() | {"conv_out.bias": torch.ones(3)}, "unet",
            names=("conv_out.bias is (3,), not (4,)",))
    assert_same(dict(net.named_parameters()), before)
