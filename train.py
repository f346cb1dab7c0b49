"""Train IDM end to end (paper, section 4): one process by `python train.py`, several by `torch.distributed.run`."""
import argparse
import math
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import nullcontext
from copy import deepcopy
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.utils.data import DataLoader

from model import IDM, BlockCompressedSensing, WeightsError
from model.checkpoint import meant
from model.operators import number_of_measurements
from model.weight_files import read_config
from utils import distributed, errors, files
from utils.data.crops import NAMED, TrainingCrops
from utils.devices import computing_in, memory_suffices
from utils.errors import UserError, listed
from utils.evaluation.speed import compile_blocks
from utils.sampling import sampling_matrix
from utils.training import report
from utils.training import state as state_files
from utils.training.learning_rate import learning_rate
from utils.training.log import TrainingLog
from utils.training.losses import LOSSES
from utils.training.run import Run, check_agreement, find_state, open_testset
from utils.training.settings import parse_args, shared_settings
from utils.training.state import Progress

GIVE_UP_AFTER = 10  # iterations in a row that were skipped; a gradient scaler's start at 65536 is then down to 64


def main() -> None:
    args = parse_args(__doc__)
    process = distributed.start(args.device)
    run = prepare(args, process)
    finished = train(run)
    if run.log:
        run.log.close()
    distributed.stop()
    if not finished:
        sys.exit(errors.INTERRUPTED)


def prepare(args: argparse.Namespace, process: distributed.Process) -> Run:
    """Read the pictures; build the network, or take up the run that is in the folder."""
    args.precision = args.precision or default_precision(process)
    check_agreement(process, shared_settings(args))
    folder = args.model_dir / args.run_name
    lock = None
    if process.is_main:
        files.make_folder(folder, "--model_dir")
        files.make_folder(args.log_dir, "--log_dir")
        lock = files.hold(folder, "--model_dir")
    state, notes = find_state(args, process)
    testset, test_notes = open_testset(args, process)
    crops = TrainingCrops(args.train_dir, args.patch_size, args.seed, cache_dir=args.cache_dir)
    if len(set(process.all_gather(crops.fingerprint()))) > 1:
        raise UserError(f"the processes find different pictures in {args.train_dir}; give all machines the same")
    net = IDM(**state["network"]) if state else build_network(args, process)
    if args.patch_size % (multiple := math.lcm(args.block_size, net.size_multiple)):
        raise UserError(f"--patch_size must be a multiple of {multiple} here, not {args.patch_size}")
    with memory_suffices(f"for the network on {process.device}; choose another --device"):
        net.to(process.device).invertible = args.invertible
        ema = deepcopy(net).requires_grad_(False).eval() if args.ema else None
    run = Run(args, process, crops, net, ema, torch.optim.Adam(net.parameters(), lr=args.learning_rate, fused=True),
              torch.amp.GradScaler(process.device.type, enabled=args.precision == "fp16"),
              Progress(**state["progress"]) if state else Progress(), testset, lock=lock)
    if state:
        notes += run.restore(state)
    if process.is_main:
        run.log = TrainingLog(args.log_dir, args.run_name, run.progress.iteration)
        notes.append(run.log.notice)
        if crops.unreadable:
            files.append_line(run.log.text, f"cannot be read: {listed(crops.unreadable, len(crops.unreadable))}")
        if len(crops.unreadable) > NAMED:
            notes.append(f"all files that cannot be read are named in {run.log.text}")
        print(report.opening(run, [*notes, *test_notes, crops.notice]), flush=True)
        if state:
            run.report(f"resumed from iteration {run.progress.iteration}")
    return run


def default_precision(process: distributed.Process) -> str:
    """One for all processes: bf16 where every GPU has it, else fp16; fp32 on CPUs. Every rank must call it."""
    if process.device.type != "cuda":
        return "fp32"
    return "bf16" if all(process.all_gather(torch.cuda.is_bf16_supported(including_emulation=False))) else "fp16"


def build_network(args: argparse.Namespace, process: distributed.Process) -> IDM:
    """The network before training; all ranks get the same."""
    state_files.seed_all(args.seed)
    source, steps = args.base_model, args.step_number
    if source == "compact":
        try:
            with memory_suffices(f"for a network of --width {args.width}"):
                return IDM.compact(args.width, steps, args.shuffle)
        except ValueError as error:
            raise UserError(f"--width {args.width} --shuffle {args.shuffle} make no network: {error}") from error
    with process.main_first():
        if not holds_idm(Path(source)):
            return IDM.from_unet(source, num_steps=steps)
        net = IDM.from_checkpoint(source)
    if net.config.num_steps != steps:
        raise UserError(f"{source} takes {net.config.num_steps} steps; use --step_number {net.config.num_steps}")
    return net


def holds_idm(path: Path) -> bool:
    """Whether `path` is IDM itself: a .pkl, or what stands for a folder that `save_pretrained` wrote."""
    try:
        return bool(read_config(meant(path), IDM.__name__))
    except WeightsError:
        return path.suffix == ".pkl"


def train(run: Run) -> bool:
    """Epoch after epoch until the last iteration; False where a signal stopped it before."""
    args, process, progress = run.args, run.process, run.progress
    report.test_and_log(run)  # where the run was killed before that was done
    if progress.iteration >= run.last_iteration:
        process.print(f"nothing is left to do; the weights are in {run.folder}")
        return True
    if progress.iteration == 0:
        run.save()  # whatever happens from now on, there is a state
    torch.backends.cudnn.benchmark = True  # crops are of one size
    model = process.wrap(run.net.train())
    if args.compile:
        compile_blocks(run.net, process.device, dynamic=False)  # crops are of one size
    seeds = (args.seed + slot for slot in run.slots)
    matrices = [sampling_matrix(max(args.cs_ratio.values), args.block_size, seed).to(process.device) for seed in seeds]
    loader = DataLoader(run.crops, batch_sampler=run.crop_numbers(), num_workers=args.num_workers,
                        worker_init_fn=distributed.leave_process_group, pin_memory=process.device.type == "cuda",
                        generator=torch.Generator())  # its own, that a start draws nothing from everybody's
    with distributed.stop_on_signal() as stop_asked:
        batches = iter(loader)  # in here, so that Ctrl-C does not end a worker that is only starting
        while progress.iteration < run.last_iteration:
            epoch = report.Epoch(run)
            if not train_epoch(run, epoch, model, matrices, batches, stop_asked):
                run.save()
                run.report(f"stopped by a signal after iteration {progress.iteration}; the same command goes on from "
                           "there")
                return False
            finish_epoch(run, epoch)
    process.print(f"done; the weights are in {run.folder}")
    return True


def train_epoch(
    run: Run,
    epoch: report.Epoch,
    model: nn.Module,  # run.net, or DistributedDataParallel around it
    matrices: list[Tensor],  # Φ of each slot, with the columns of the highest ratio
    batches: Iterator[Tensor],  # (batch, 1, P, P) uint8
    stop_asked: threading.Event,
) -> bool:
    """Train to the end of the epoch or of the run; False where a signal stopped it before."""
    args, process, progress = run.args, run.process, run.progress
    pulse, saved = distributed.Pulse(process, progress.iteration + 1), time.monotonic()
    with epoch.bar() as bar:
        while progress.iteration < epoch.end:
            with memory_suffices("for a training step: choose a smaller --batch_size or --patch_size, or "
                                 "--invertible both"):
                loss = accumulate(run, epoch, model, matrices, batches)
                norm = update(run, loss)
            bar.update()
            epoch.point(loss, norm)
            save_due = process.is_main and time.monotonic() - saved > 60 * args.save_minutes
            if not pulse.due(progress.iteration, stop_asked.is_set() or save_due):
                continue
            stop, save_due = pulse.confer(progress.iteration, [stop_asked.is_set(), save_due])
            epoch.show(bar, loss)
            give_up_if_nothing_is_finite(run)
            if stop:
                return progress.iteration == epoch.end
            if save_due and progress.iteration < epoch.end:  # at its end, the state will hold the epoch's record
                run.save()
                saved = time.monotonic()
    return True


def accumulate(
    run: Run, epoch: report.Epoch, model: nn.Module, matrices: list[Tensor], batches: Iterator[Tensor]
) -> Tensor:
    """Gradients of this process's batches of one iteration, averaged over all processes; returns their mean loss."""
    losses = []
    for slot, matrix in zip(run.slots, matrices, strict=True):
        with epoch.waiting():
            pixels = next(batches)
        more = slot != run.slots[-1]  # gradients are exchanged once, with the last batch
        with model.no_sync() if more and hasattr(model, "no_sync") else nullcontext():
            losses.append(backward(run, model, matrix, slot, pixels))
    return torch.stack(losses).mean()


def backward(run: Run, model: nn.Module, matrix: Tensor, slot: int, pixels: Tensor) -> Tensor:
    """Gradients of the loss of one batch, measured through a fresh permutation; returns the loss."""
    args, device = run.args, run.process.device
    generator = torch.Generator().manual_seed(distributed.seed_of(args.seed, run.progress.iteration, slot))
    columns = number_of_measurements(args.cs_ratio.draw(generator), args.block_size)
    symmetry = int(torch.randint(8, (), generator=generator))
    permutation = torch.randperm(args.patch_size**2, generator=generator)
    if device.type == "cuda":
        permutation = permutation.pin_memory()  # else the copy would wait for the device
    operator = BlockCompressedSensing(matrix[:, :columns], permutation.to(device, non_blocking=True),
                                      (args.patch_size, args.patch_size))

    x = pixels.to(device, non_blocking=True).float() / 255
    x = x.rot90(symmetry % 4, (2, 3))
    x = x.flip(3) if symmetry >= 4 else x
    with computing_in(args.precision, device):
        x_hat = model(operator.A(x), operator)
    loss = LOSSES[args.loss](x_hat.float(), x)
    # 1, or nan: a loss that is not finite thus shows in the gradients of all processes.
    finite = 1 + 0 * loss.detach()
    run.scaler.scale(finite * loss / args.accumulate).backward()
    return loss.detach()


@torch.no_grad()
def update(run: Run, loss: Tensor) -> Tensor:
    """One step of Adam, or none where the gradients are not finite; returns their norm."""
    args, progress = run.args, run.progress
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate(args, progress.iteration)
    run.scaler.unscale_(run.optimizer)
    norm = get_total_norm([parameter.grad for parameter in run.net.parameters() if parameter.grad is not None])
    if args.clip:
        clip_grads_with_norm_(run.net.parameters(), args.clip, norm)
    finite = norm.isfinite()
    if not run.scaler.is_enabled():  # which gives the optimizer this itself; 1 makes it leave the weights alone
        run.optimizer.found_inf = 1 - finite.float()
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.optimizer.zero_grad()
    if run.ema:
        decay = min(args.ema, (1 + progress.iteration) / (10 + progress.iteration))  # the first weights are forgotten
        torch._foreach_lerp_(list(run.ema.parameters()), list(run.net.parameters()), 1 - decay)
    loss_sum, count, skipped, in_a_row = run.totals
    run.totals = torch.stack([loss_sum + loss.where(finite, 0), count + finite, skipped + ~finite,
                              (in_a_row + 1) * ~finite])
    progress.iteration += 1
    progress.crops += run.batches * args.batch_size
    return norm


def give_up_if_nothing_is_finite(run: Run) -> None:
    """All processes see the same gradients, and so end together."""
    in_a_row = int(run.totals[3])
    if in_a_row >= GIVE_UP_AFTER:
        sys.exit(1 if not run.process.is_main else
                 f"error: no finite loss or gradient in {in_a_row} iterations in a row, up to iteration "
                 f"{run.progress.iteration}; the last state is kept; try a smaller --learning_rate or "
                 "--precision fp32, with another --model_dir")


def finish_epoch(run: Run, epoch: report.Epoch) -> None:
    """Report, save and test after an epoch, or after the part of one that `--max_iters` leaves."""
    args, progress = run.args, run.progress
    run.read_totals()
    record = epoch.record()
    if progress.iteration % args.iters_per_epoch == 0:
        run.totals[:2] = 0
    # Where an epoch was taken up in its middle, --max_iters may have left a checkpoint of its first part.
    due = (epoch.number % args.save_interval == 0 or progress.iteration == run.last_iteration
           or epoch.start % args.iters_per_epoch)
    if run.process.is_main and due:
        state_files.save_checkpoint(run.best, run.folder, epoch.number)
    run.unlogged = record
    run.save()  # after the checkpoint: what a state counts as done is all there
    report.test_and_log(run)


if __name__ == "__main__":
    errors.run(main, WeightsError)
