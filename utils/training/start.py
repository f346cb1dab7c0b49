"""How a training run begins, or is taken up again from the state in its folder."""
import math
import os
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from model import IDM, WeightsError, checkpoint
from model.memory import FASTEST_FIRST, choose, free_bytes
from model.operators import OperatorError, check_operator
from model.settings import for_both
from model.weight_files import read_config
from utils import files
from utils.data.crops import NAMED, TrainingCrops
from utils.data.testsets import Picture, load_testset
from utils.devices import PRECISIONS, memory_suffices
from utils.distributed import Process
from utils.errors import UserError, listed
from utils.training.log import TrainingLog
from utils.training.report import opening
from utils.training.run import Run, configuration
from utils.training.settings import NO_TESTS, Settings, check_configuration
from utils.training.state import (
    Progress,
    TrainingState,
    holds_checkpoint,
    list_states,
    load_newest_state,
    load_state,
    restore_random_states,
    seed_all,
)
from utils.weights import check_channels

YOUNGER = {"log_damping"}  # parameters that states of earlier versions have not

# Builds the network that settings describe or, where it is not None, the configuration in a state.
Builder = Callable[[Settings, Process, dict[str, Any] | None], nn.Module]


def open_run(settings: Settings, process: Process, build: Builder | None = None,
             ) -> tuple[Run, dict[str, Any] | None]:
    """Read the pictures; build the network, IDM if not told how, or take up the run that is in the folder.

    Returns the run, and the record of its last epoch where the tests after that are still to be done.
    """
    settings = replace(settings, precision=settings.precision or default_precision(process),
                       invertible=settings.invertible or ("auto" if process.device.type == "cuda" else "both"))
    check_agreement(process, settings.shared())
    lock = None
    if process.is_main:
        files.make_folder(settings.folder, "--model_dir")
        files.make_folder(settings.log_dir, "--log_dir")
        lock = files.lock_folder(settings.folder, "--model_dir")
    state, notes = find_state(settings, process)
    resumed = state is not None
    testset, test_notes = open_testset(settings, process)
    crops = open_crops(settings, process)
    if state:
        notes += check_state(state, configuration(settings, crops), settings, process)
    elif settings.decay_from:
        state, more = state_to_decay(settings, process)
        notes += more
    check_operators(settings)
    run = build_run(settings, process, crops, state, build or build_idm)
    run.testset, run.lock = testset, lock
    if settings.invertible == "auto" and "invertible" not in settings.without:
        notes.append(choose_reversal(run))
    if process.is_main:
        run.log = TrainingLog(settings.log_dir, settings.name, run.progress.iteration)
        notes.append(run.log.notice)
        if crops.unreadable:
            run.log.note(f"cannot be read: {listed(crops.unreadable, len(crops.unreadable))}")
        if len(crops.unreadable) > NAMED:
            notes.append(f"all files that cannot be read are named in {run.log.text}")
        print(opening(run, [*notes, *test_notes, crops.notice]), flush=True)
        if resumed:
            run.report(f"resumed from iteration {run.progress.iteration}")
    return run, state.unlogged if resumed else None


def choose_reversal(run: Run) -> str:
    """Set what --invertible auto means on the process with the least memory; returns what there is to say about it."""
    settings, device, side = run.settings, run.process.device, run.settings.patch_size
    free = free_bytes(device)
    if free is not None and device.type == "cpu":  # which the processes of a machine share
        free //= int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    half = PRECISIONS[settings.precision] if settings.precision != "fp32" else None
    choice = choose(run.net, (settings.batch_size, run.net.config.in_channels, side, side), device, half, free)
    choice = max(run.process.all_gather(choice), key=lambda each: FASTEST_FIRST.index(each.levels))
    run.net.invertible = choice.levels
    return f"--invertible auto is {choice}"


def default_precision(process: Process) -> str:
    """One for all processes: bf16 where every GPU has it, else fp16; fp32 on CPUs. Every rank must call it."""
    if process.device.type != "cuda":
        return "fp32"
    return "bf16" if all(process.all_gather(torch.cuda.is_bf16_supported(including_emulation=False))) else "fp16"


def check_agreement(process: Process, settings: dict[str, str]) -> None:
    """Raise UserError, naming the differences, unless all processes have these settings; every rank must call it."""
    of_all = process.all_gather(settings)
    different = [f"--{name} {' and '.join(dict.fromkeys(each[name] for each in of_all))}"
                 for name, value in settings.items() if any(each[name] != value for each in of_all)]
    if different:
        raise UserError(f"the processes were given different settings: {', '.join(different)}; give all the same")


def find_state(settings: Settings, process: Process) -> tuple[TrainingState | None, list[str]]:
    """The state in the run's folder, None where the run is new; and what there is to say about it.

    Raises:
        UserError: where the folder holds a run that cannot go on, or the processes find different states.
    """
    folder = settings.folder
    if not settings.resume and any(int(path.stem.partition("_")[2]) for path in list_states(folder)):
        raise UserError(f"{folder} holds an earlier run; leave out --no-resume to go on with it, or train into another "
                        "--model_dir")
    state, notes = load_newest_state(folder)
    check_same_state(state, "--model_dir", process)
    if state and state.progress.iteration == 0:
        state = None  # not begun: a start makes the same network again, or another if the settings are others
    elif state is None and holds_checkpoint(folder):
        raise UserError(f"{folder} holds weights but no state to go on from; train into another --model_dir")
    return state, notes


def state_to_decay(settings: Settings, process: Process) -> tuple[TrainingState, list[str]]:
    """Return the state of another run as the beginning of this one; and what there is to say about it.

    Raises:
        UserError: where there is none, or the processes find different ones.
    """
    seed_all(settings.seed)
    path = settings.decay_from
    state, notes = load_newest_state(path) if path.is_dir() else (load_state(path), [])
    if state is None:
        raise UserError(f"--decay_from {path} holds no training state; name a run's folder, or a state_*.pt in one")
    check_same_state(state, "--decay_from", process)
    seen = Progress(crops=state.progress.crops, before=state.progress.before + state.progress.iteration)
    return replace(state, progress=seen, random=[], unlogged=None), notes


def check_same_state(state: TrainingState | None, flag: str, process: Process) -> None:
    """Raise UserError unless all processes have found the same state; every rank must call it."""
    if len(set(process.all_gather(state and (state.progress.before, state.progress.iteration)))) > 1:
        raise UserError(f"the processes find different states to go on from; {flag} must be one folder that all "
                        "machines share")


def check_state(state: TrainingState, now: dict[str, Any], settings: Settings, process: Process) -> list[str]:
    """Return what there is to say where other processes go on from a state than wrote it.

    Raises:
        UserError: where the state is of a run with other settings.
    """
    saved, batches = dict(state.configuration), process.world_size * settings.accumulate
    before = state.processes * saved["accumulate"]
    if before == batches:  # shared out in another way, but the same iteration
        saved["accumulate"] = now["accumulate"]
    check_configuration(saved, now, settings.folder, type(settings))
    if state.processes == process.world_size:
        return []
    return [f"{state.processes} process(es) wrote the state, {process.world_size} go on; an iteration was "
            f"{before * settings.batch_size} crops, and is {batches * settings.batch_size}"]


def open_testset(settings: Settings, process: Process) -> tuple[list[Picture], list[str]]:
    """The pictures to test on, and what there is to say where a machine has not those that are tested on by default.

    Raises:
        UserError: where a machine has no such set, although it was asked for.
    """
    if settings.testset_name == NO_TESTS:
        return [], []
    problem = f"another machine has no pictures of {settings.testset_name}"
    try:
        pictures = load_testset(settings.testset_name, settings.data_dir)
    except UserError as error:
        pictures, problem = [], str(error)
    if all(process.all_gather(len(pictures))):
        return pictures, []
    if settings.testset_name != Settings.testset_name:
        raise UserError(f"{problem}; or use --testset_name {NO_TESTS}")
    return [], [f"no test after each epoch, since {problem}"]


def open_crops(settings: Settings, process: Process) -> TrainingCrops:
    """The training pictures, of which all processes must find the same."""
    crops = TrainingCrops(settings.train_dir, settings.patch_size, settings.seed, cache_dir=settings.cache_dir)
    if len(set(process.all_gather(crops.fingerprint()))) > 1:
        raise UserError(f"the processes find different pictures in {settings.train_dir}; give all machines the same")
    return crops


def build_run(settings: Settings, process: Process, crops: TrainingCrops, state: TrainingState | None,
              build: Builder) -> Run:
    """Build the network, its average and the optimizer, as a state has them where there is one."""
    net = build(settings, process, state and state.network)
    if state:
        load_weights(net, state.model)
    with memory_suffices(f"for the network on {process.device}; choose another --device"):
        net.to(process.device)
        ema = deepcopy(net).requires_grad_(False).eval() if settings.ema else None
    optimizer = torch.optim.Adam(net.parameters(), lr=settings.learning_rate, fused=True)
    scaler = torch.amp.GradScaler(process.device.type, enabled=settings.precision == "fp16")
    if not state:
        return Run(settings, process, crops, net, ema, optimizer, scaler, Progress())
    if ema and state.ema:  # a run that decays from one without an average begins one
        load_weights(ema, state.ema)
    optimizer.load_state_dict(renumbered(state.optimizer, list(state.model), net))
    if state.scaler:  # that of another precision has none
        scaler.load_state_dict(state.scaler)
    if process.rank < len(state.random):
        restore_random_states(state.random[process.rank])
    return Run(settings, process, crops, net, ema, optimizer, scaler, state.progress)


def load_weights(net: nn.Module, weights: dict[str, Tensor]) -> None:
    """Load those of a state; what is younger than the state stays as it was built.

    Raises:
        UserError: where they do not fit.
    """
    try:
        absent, unknown = net.load_state_dict(weights, strict=False)
    except RuntimeError as error:  # of shapes
        raise UserError(f"the weights in the state do not fit the network ({error})") from error
    if wrong := [*(set(absent) - YOUNGER), *unknown]:
        raise UserError(f"the weights in the state do not fit the network: {listed(wrong)}")


def renumbered(optimizer: dict[str, Any], names: list[str], net: nn.Module) -> dict[str, Any]:
    """Return an optimizer's state, saved with weights of these names, with its parameters numbered as in `net`."""
    now = [name for name, _ in net.named_parameters()]
    parameters = set(now)
    numbers = {name: number for number, name in enumerate(name for name in names if name in parameters)}
    state = {number: optimizer["state"][numbers[name]] for number, name in enumerate(now)
             if numbers.get(name) in optimizer["state"]}
    (group,) = optimizer["param_groups"]
    return {"state": state, "param_groups": [{**group, "params": list(range(len(now)))}]}


def build_idm(settings: Settings, process: Process, config: dict[str, Any] | None) -> IDM:
    """IDM as a state has it, or before training, for crops that it takes."""
    source = f"the state in {settings.decay_from or settings.folder}"
    try:
        net = checkpoint.build(IDM, config, source) if config else build_network(settings, process)
    except WeightsError as error:
        raise UserError(str(error)) from error
    if (steps := net.config.num_steps) != settings.step_number:
        source = settings.decay_from or settings.base_model
        raise UserError(f"{source} takes {steps} steps; use --step_number {steps}")
    check_fits(net, settings)
    if settings.attention_window:
        net.attention_window = settings.attention_window
    net.invertible = "both" if settings.invertible in (None, "auto") else settings.invertible  # "auto" is told later
    return net


def check_operators(settings: Settings) -> None:
    """Raise UserError where an operator contradicts itself; that of compressed sensing is known not to."""
    side = settings.patch_size
    for measurement in settings.measured(settings.cs_ratio.values[-1:]):
        if measurement.operator == "cs":
            continue
        operator = measurement.draw((side, side), torch.Generator().manual_seed(settings.seed))
        try:
            check_operator(operator, (side, side))
        except OperatorError as error:
            raise UserError(f"the operator {measurement.operator} contradicts itself: {error}") from error


def check_fits(net: IDM, settings: Settings) -> None:
    """Raise UserError where the network is not what the settings say, or does not take crops of their size."""
    config = {**net.config, "attention": for_both(net.config.attention, "attention")}
    source = settings.decay_from or settings.base_model
    for name, value in settings.network().items():
        if config[name] != value:
            raise UserError(f"the network of {source} has {name} {config[name]}; leave out --{name}")
    check_channels(net, source)
    measured = settings.measured(settings.cs_ratio.values)
    multiple = math.lcm(net.size_multiple, *(each.side_multiple for each in measured))
    if settings.patch_size % multiple:
        raise UserError(f"--patch_size must be a multiple of {multiple} here, not {settings.patch_size}")


def build_network(settings: Settings, process: Process) -> IDM:
    """The network before training; all ranks get the same."""
    seed_all(settings.seed)
    source, steps, width, shuffle = settings.base_model, settings.step_number, settings.width, settings.shuffle
    try:
        if source == "compact":
            with memory_suffices(f"for a network of --width {width}"):
                return IDM.compact(width, steps, shuffle, **settings.network())
        with process.main_first():
            if holds_idm(Path(source)):
                return IDM.from_checkpoint(source)
            return IDM.from_unet(source, num_steps=steps, **settings.network())
    except WeightsError:
        raise
    except ValueError as error:
        size = f"--width {width} --shuffle {shuffle}" if source == "compact" else source
        raise UserError(f"{size} makes no network: {error}") from error


def holds_idm(path: Path) -> bool:
    """Whether `path` is IDM itself: a .pkl, or what stands for a folder that `save_pretrained` wrote."""
    try:
        return bool(read_config(checkpoint.meant(path), IDM.__name__))
    except WeightsError:
        return path.suffix == ".pkl"
