"""The precision that `--precision auto` picks, and compilers that are not there."""
import math
import time

import numpy as np
import pytest
import torch

from model import IDM, BlockCompressedSensing
from model.unet import Attention, Resnet
from utils.data.testsets import Picture
from utils.distributed import Process
from utils.errors import UserError
from utils.evaluation import speed
from utils.evaluation.evaluate import Scores
from utils.evaluation.protocol import Protocol
from utils.measurement import Measurement

CPU = Process(0, 1, torch.device("cpu"))
MEASUREMENT = Measurement(settings={"cs_ratio": 0.5, "block_size": 8}, seed=0)
GREY = [Picture(name, np.full((16, 16), 100, np.uint8)) for name in "abc"]


@pytest.mark.parametrize("found, expected", [
    ({"avx2": True, "avx512_f": True}, []), ({"avx512_bf16": True}, ["bf16"]), ({"amx_bf16": True}, ["bf16"]),
    ({"neon": True, "bf16": True}, ["bf16"]), ({"avx512_bf16": False}, [])])
def test_cpus_take_bf16_only_with_instructions_for_it(monkeypatch, found, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found)
    assert speed.half_precisions(torch.device("cpu")) == expected


@pytest.mark.parametrize("bf16", [True, False])
def test_gpus_take_fp16_and_bf16_where_it_is_not_emulated(monkeypatch, bf16):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bf16 or including_emulation)
    assert speed.half_precisions(torch.device("cuda")) == (["fp16", "bf16"] if bf16 else ["fp16"])


@pytest.mark.parametrize("fp16, bf16, expected", [
    ((29.995, 1.0), (29.98, 0.5), "fp16"),  # bf16 is faster but costs 0.02 dB
    ((29.995, 1.0), (29.991, 0.5), "bf16"),
    ((30.0, 2.5), (30.1, 3.0), "fp32"),  # neither is faster
    ((math.nan, 0.1), (29.999, 0.2), "bf16"),  # fp16 overflowed
    ((math.nan, 0.1), (-math.inf, 0.2), "fp32"),
])
def test_the_fastest_that_costs_little_is_picked(fp16, bf16, expected):
    scores = {name: Scores({"psnr": psnr}, seconds, count=2) for name, (psnr, seconds) in
              {"fp32": (30.0, 2.0), "fp16": fp16, "bf16": bf16}.items()}
    best, reason = speed._choice(scores)
    assert best == expected
    assert reason.startswith(f"{expected}: on 2 pictures, fp16 takes {fp16[1] / 2:.2f} times the seconds of fp32")


@pytest.mark.parametrize("offset, expected", [(1.0, "bf16"), (1.01, "fp32")])
def test_the_cost_is_measured(monkeypatch, offset, expected):
    """A network that is wrong by one grey level in fp32 and by `offset` in bf16: 20 log10(1.01) = 0.086 dB."""
    monkeypatch.setattr(speed, "half_precisions", lambda device: ["bf16"])
    batches = []

    def net(y, operator):
        half = torch.is_autocast_enabled("cpu")
        batches.append((half, len(y)))
        time.sleep(0 if half else 0.05)
        return torch.full((len(y), 1, 16, 16), (100 + (offset if half else 1)) / 255)

    best, reason = speed.pick_precision(CPU, net, GREY, Protocol(MEASUREMENT, batch_size=2))
    assert best == expected
    assert batches == [(False, 2)] * 2 + [(True, 2)] * 2  # the first batch, twice each
    assert f"costs {20 * math.log10(offset):.4f} dB" in reason


def test_without_instructions_nothing_is_tried(monkeypatch):
    monkeypatch.setattr(speed, "half_precisions", lambda device: [])
    best, reason = speed.pick_precision(CPU, None, GREY, Protocol(MEASUREMENT))
    assert (best, reason) == ("fp32", "fp32, since cpu has no instructions for less")


def test_every_resnet_and_attention_is_compiled(monkeypatch):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    monkeypatch.setattr(speed, "BACKEND", backend)
    net = IDM(block_out_channels=(32, 64), num_steps=1).eval()
    y, operator = torch.zeros(1, 16, 8), BlockCompressedSensing.random((16, 16), 0.5, 4, torch.Generator())
    with torch.inference_mode():
        expected = net(y, operator)
        speed.compile_blocks(net, torch.device("cpu"))
        assert len(graphs) == 1  # of the trial
        assert (net(y, operator) - expected).abs().max() < 1e-5
    blocks = [module for module in net.modules() if isinstance(module, Resnet | Attention)]
    assert len(blocks) > 10 and all(block._compiled_call_impl for block in blocks)
    assert len(graphs) > 2


def test_a_compiler_that_is_not_there_is_said_in_a_sentence(monkeypatch):
    def broken(graph, inputs):
        raise RuntimeError("no g++\nand a long story")
    monkeypatch.setattr(speed, "BACKEND", broken)
    with pytest.raises(UserError, match=r"--compile finds no working compiler for cpu \(.*\); leave it out"):
        speed.compile_blocks(None, torch.device("cpu"))
