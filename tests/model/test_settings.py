"""The network's settings by name: what is saved is loaded as it was, what is not known is refused, and what they do."""
import json
import math
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from model import IDM, BlockCompressedSensing, WeightsError, unet
from model.checkpoint import build
from model.idm import INVERTIBLE
from model.schedules import DynamicSchedule

TODAY = {"block_out_channels": [32, 64], "num_steps": 2, "shuffle": 4, "num_attention_heads": 2, "norm_groups": 1}


def network(**settings) -> IDM:
    """A small network in float64 with weights that nothing is zero in."""
    torch.manual_seed(0)
    net = IDM(**{**TODAY, **settings}).double()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return net


def measured(batch: int = 1) -> tuple[BlockCompressedSensing, Tensor]:
    operator = BlockCompressedSensing.random((32, 32), 0.25, 16, torch.Generator().manual_seed(0)).double()
    x = torch.rand(batch, 1, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return operator, operator.A(x)


def assert_gradients_are_plain_autograds(net: IDM, batch: int = 1, **arguments) -> None:
    operator, y = measured(batch)
    y.requires_grad_()
    found = []
    for net.invertible in ("none", *INVERTIBLE):
        loss = net(y, operator, **arguments).abs().mean()
        gradients = torch.autograd.grad(loss, [y, *net.parameters()], materialize_grads=True)
        found.append(torch.cat([gradient.flatten() for gradient in gradients]))
    assert found[0].norm() > 0
    assert all((ours - found[0]).norm() <= 1e-9 * found[0].norm() for ours in found)


# --- names ----------------------------------------------------------------------------------------------------------

OLD = {  # the config that the first compact weights came with
    "_class_name": "IDM", "_diffusers_version": "0.42.1", "block_out_channels": [64, 128], "norm_groups": 1,
    "num_attention_heads": 2, "num_steps": 3, "shuffle": 4,
}


def test_what_was_saved_before_there_were_names_is_the_published_network(tmp_path: Path):
    """Neither folders nor training states named coupling, schedule or attention."""
    saved = IDM.compact()
    saved.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(OLD))
    for net in (IDM.from_checkpoint(tmp_path), build(IDM, TODAY, "the state")):
        assert (net.config.coupling, net.config.schedule, net.attention_window) == ("weighted", "learned", (None, None))
        assert len([name for name, _ in net.named_modules() if name.endswith("attn1")]) == 10
        assert all(f"steps.{step}.v" in net.state_dict() for step in range(net.config.num_steps))
    loaded = IDM.from_checkpoint(tmp_path).state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in saved.state_dict().items())


@pytest.mark.parametrize("settings", [
    {"coupling": "additive", "shuffle": 2},
    {"schedule": "dynamic", "schedule_settings": {"scale": 7.0}},
    {"attention": (False, True)},
    {"attention": (False, False), "schedule": "dynamic"},
    {"attention_window": (2, None)},
], ids=str)
def test_a_network_is_loaded_as_what_it_was_saved_as(settings, tmp_path: Path):
    net, (operator, y) = network(**settings).float(), measured()
    net.save_pretrained(tmp_path)
    state = {name: value for name, value in net.config.items() if not name.startswith("_")}
    with torch.inference_mode():
        expected = net(y, operator.float())
        for loaded in (IDM.from_checkpoint(tmp_path), IDM.from_pretrained(tmp_path), build(IDM, state, "the state")):
            loaded.load_state_dict(net.state_dict())
            assert torch.equal(loaded(y, operator), expected)
            for name, value in settings.items():
                assert json.loads(json.dumps(loaded.config[name])) == json.loads(json.dumps(value))


@pytest.mark.parametrize(("setting", "message"), [
    ({"coupling": "unheard"}, "coupling must be one of weighted, additive, not 'unheard'"),
    ({"schedule": "unheard"}, "schedule must be one of learned, dynamic, not 'unheard'"),
    ({"schedule": "dynamic", "schedule_settings": {"speed": 2}}, "'dynamic' cannot have the settings {'speed': 2}"),
    ({"schedule": "dynamic", "schedule_settings": {"scale": 1}}, "scale must be above 1, not 1"),
    ({"coupling": "additive", "shuffle": 2, "num_attention_heads": 32}, "half of 32, on which the coupling"),
    ({"attention": (True, True, True)}, "attention must be one value or two"),
    ({"attention_window": 0}, "attention_window must be None or at least 1"),
    ({"of_a_later_version": 1}, "of_a_later_version"),
], ids=str)
def test_an_unknown_setting_is_refused_in_one_sentence(setting, message, tmp_path: Path):
    net = network().float()
    net.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | setting))
    for load in (lambda: IDM.from_checkpoint(tmp_path), lambda: build(IDM, TODAY | setting, "the state")):
        with pytest.raises(WeightsError) as caught:
            load()
        assert message in str(caught.value) and "\n" not in str(caught.value)
    if "of_a_later_version" not in setting:
        with pytest.raises(ValueError, match="must be|cannot have|half of"):
            IDM(**TODAY | setting)


@pytest.mark.parametrize(("settings", "message"), [
    ({"schedule": "dynamic"}, "schedule learned, not dynamic"),
    ({"coupling": "additive", "num_attention_heads": 4, "norm_groups": 16}, "coupling weighted, not additive"),
    ({"attention": (True, False)}, r"attention \(True, True\), not \(True, False\)"),
    ({"attention_window": 8}, r"attention_window \(None, None\), not \(8, 8\)"),
])
def test_the_published_format_cannot_hold_other_settings(settings, message):
    net = IDM((32, 64), num_steps=1, **settings)
    assert not net.fits_official_format
    with pytest.raises(ValueError, match=message):
        net.official_state_dict()


# --- the dynamic schedule -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("num_steps", [1, 3, 10])
@pytest.mark.parametrize("scale", [2.0, 20.0])
def test_the_dynamic_schedule_begins_with_its_closed_form(num_steps: int, scale: float):
    alpha_bar = DynamicSchedule(num_steps, scale)(torch.rand(3, 1, 16, 16))
    assert alpha_bar.shape == (3, num_steps + 1)
    expected = [math.prod(1 - (1 - math.cos(math.pi * i / (2 * num_steps))) / scale for i in range(1, t + 1))
                for t in range(num_steps + 1)]
    assert (alpha_bar - torch.tensor(expected)).abs().max() <= 1e-7


def test_the_dynamic_schedule_depends_on_the_image_and_stays_inside():
    torch.manual_seed(0)
    schedule, images = DynamicSchedule(4), torch.rand(5, 2, 16, 16)
    for gamma in (-1e6, -1.0, 0.05, 1.0, 1e6):
        torch.nn.init.constant_(schedule.gamma, gamma)
        alpha_bar = schedule(images)
        assert ((alpha_bar[:, 1:] > 0) & (alpha_bar[:, 1:] < 1)).all() and (alpha_bar.diff() <= 0).all()
        assert torch.allclose(alpha_bar[2], schedule(images[2:3])[0])
    torch.nn.init.constant_(schedule.gamma, 0.05)
    assert schedule(images)[:, 1].unique().numel() == 5


def test_gradients_with_an_alpha_bar_for_each_image(monkeypatch):
    """Also where the U-Net takes the batch apart; and what is learned of the schedule moves."""
    monkeypatch.setattr("model.idm.PIXELS_AT_ONCE", 2 * 8 * 8)
    net = network(schedule="dynamic")
    assert_gradients_are_plain_autograds(net, batch=3)
    operator, y = measured(3)
    net(y, operator).abs().mean().backward()
    assert all(parameter.grad.norm() > 0 for parameter in net.schedule.parameters())
    with torch.no_grad():
        alone = torch.cat([net(each, operator) for each in y.split(1)])
        assert torch.allclose(net(y, operator), alone, rtol=1e-9, atol=1e-12)


# --- the additive coupling -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("settings", [{}, {"attention": (True, False), "schedule": "dynamic"}], ids=str)
def test_gradients_with_additive_couplings(settings, monkeypatch):
    monkeypatch.setattr("model.idm.PIXELS_AT_ONCE", 16 * 16)
    net = network(coupling="additive", shuffle=2, **settings)
    assert not any(name.endswith(".v") for name, _ in net.named_parameters())
    assert_gradients_are_plain_autograds(net, batch=2)
    net.store_every = None  # nothing is amplified where all is inverted
    assert_gradients_are_plain_autograds(net)


def test_the_halves_of_a_block_are_added_to_in_turn():
    net, (operator, y) = network(coupling="additive", shuffle=2), measured()
    block, inputs = net.unet.down_blocks[0], unet.Inputs(operator.A_adjoint(y), operator, 1)
    injection = (inputs.folded(2), operator, 1)
    x = torch.randn(1, 32, 16, 16, dtype=torch.float64)
    with torch.no_grad():
        block(x, inputs)
        x1, x2 = x[:, :16], x[:, 16:]
        for pair in range(2):
            resnet, injector, attention, other = (
                function.body for coupling in block.chains[pair] for function in (coupling.f, coupling.g))
            x1 = x1 + resnet(x2) - x2
            x2 = x2 + injector(x1, *injection) - x1
            x1 = x1 + attention(x2) - x2
            x2 = x2 + other(x1, *injection) - x1
            skip = inputs.skips[f"down_0.pair_{pair}"]
            assert torch.allclose(skip, torch.cat((x1, x2), dim=1), rtol=1e-9, atol=1e-9)


def test_the_sampling_chain_is_reversible_noise_injection():
    net, (operator, y) = network(coupling="additive", shuffle=2), measured()
    with torch.no_grad():
        back, (alpha_bar,) = operator.A_adjoint(y), net.schedule()
        x2 = alpha_bar[2].sqrt() * back
        context = {"unet": net.unet, "operator": operator, "y": y, "back_projection": back,
                   "alpha_bar": alpha_bar[None], "damping": torch.zeros(1, 2)}
        f2, f1 = (partial(net.steps[2 - step].coupling.f.step, **context, step=step) for step in (2, 1))
        x1 = net.input_scale * x2 + f2(x2) - x2
        x0 = x2 + f1(x1) - (alpha_bar[2] / alpha_bar[1]).sqrt() * x1
        assert torch.allclose(net(y, operator), x0 + net.merge_scale * x1, rtol=1e-9, atol=1e-9)


def test_a_fresh_additive_network_returns_the_back_projection():
    operator, y = measured()
    net = IDM.compact(32, 2, shuffle=2, coupling="additive", schedule="dynamic").double()
    with torch.no_grad():
        assert torch.allclose(net(y, operator), operator.A_adjoint(y), atol=1e-6)


# --- without attention ----------------------------------------------------------------------------------------------

def test_a_scale_without_attention_keeps_its_injectors():
    names = [name for name, _ in network(attention=(False, True)).named_parameters()]
    blocks = {prefix: [name for name in names if name.startswith(f"unet.{prefix}.")] for prefix in
              ("down_blocks.0", "up_blocks.1", "down_blocks.1", "up_blocks.0")}
    attentions = {prefix: sum(name.endswith("attn1.to_q.weight") for name in own) for prefix, own in blocks.items()}
    injectors = {prefix: sum(name.endswith(".lift.0.weight") for name in own) for prefix, own in blocks.items()}
    assert list(attentions.values()) == [0, 0, 2, 3]
    assert list(injectors.values()) == [4, 6, 4, 6]


def test_gradients_without_attention():
    assert_gradients_are_plain_autograds(network(attention=False))


# --- fewer steps ----------------------------------------------------------------------------------------------------

def test_a_chain_begun_later_is_that_of_a_network_of_fewer_steps():
    net, fewer, (operator, y) = network(num_steps=3), network(num_steps=2), measured()
    state = {name: tensor for name, tensor in net.state_dict().items() if ".lift.2." not in name
             and ".unlift.2." not in name and name != "steps.0.v"}
    state |= {"schedule.alpha": state["schedule.alpha"][:2], "log_damping": state["log_damping"][:2],
              "steps.0.v": state["steps.1.v"], "steps.1.v": state.pop("steps.2.v")}
    fewer.load_state_dict(state)
    assert torch.allclose(net(y, operator, steps=2), fewer(y, operator), rtol=1e-12, atol=1e-12)
    for steps in (0, 4):
        with pytest.raises(ValueError, match=f"steps must be from 1 to 3, not {steps}"):
            net(y, operator, steps=steps)


def test_gradients_of_fewer_steps_are_zero_where_a_parameter_is_not_used():
    net, (operator, y) = network(num_steps=3), measured()
    assert_gradients_are_plain_autograds(net, steps=1)
    for net.invertible in INVERTIBLE:
        net.zero_grad()
        net(y, operator, steps=1).abs().mean().backward()
        assert all(parameter.grad is not None for parameter in net.parameters())
        assert net.steps[0].v.grad == 0 and net.steps[2].v.grad != 0
