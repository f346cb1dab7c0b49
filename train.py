"""Train IDM end to end (paper, section 4): one process by `python train.py`, several by `torch.distributed.run`."""
import argparse
import json
import math
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from model import IDM, BlockCompressedSensing, WeightsError
from utils import distributed, errors, files, training_state
from utils.datasets import TrainingCrops
from utils.devices import memory_suffices
from utils.errors import UserError
from utils.evaluation import PRECISIONS, evaluate, mean_scores
from utils.learning_rate import learning_rate
from utils.sampling import sampling_matrix
from utils.testsets import Picture, load_testset
from utils.training_options import configuration, parse_args
from utils.training_state import Progress

GIVE_UP_AFTER = 10  # iterations in a row that were skipped; a gradient scaler's start at 65536 is then down to 64


@dataclass
class Run:
    """What a training run consists of."""

    args: argparse.Namespace
    process: distributed.Process
    crops: TrainingCrops
    net: IDM
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    progress: Progress = field(default_factory=Progress)

    @property
    def last_iteration(self) -> int:
        return min(self.args.epoch * self.args.iters_per_epoch, self.args.max_iters or sys.maxsize)

    @property
    def configuration(self) -> dict[str, str | int | float]:
        return configuration(self.args, self.process.world_size, self.crops.fingerprint())

    @property
    def folder(self) -> Path:
        return self.args.model_dir / self.args.run_name

    @property
    def log(self) -> Path:
        return self.args.log_dir / f"{self.args.run_name}.txt"

    def report(self, line: str) -> None:
        """Print and log one line, on rank 0."""
        self.process.print(line)
        if self.process.is_main:
            files.append_line(self.log, line)


def main() -> None:
    args = parse_args(__doc__)
    process = distributed.start(args.device)
    run = prepare(args, process)
    describe(run)
    train(run)
    distributed.stop()


def prepare(args: argparse.Namespace, process: distributed.Process) -> Run:
    """Read the pictures; build the network, or take up the run that `--resume` finds."""
    args.precision = args.precision or ("fp16" if process.device.type == "cuda" else "fp32")
    folder = args.model_dir / args.run_name
    state_path = folder / "state.pt"
    state = training_state.load_state(state_path) if args.resume and state_path.exists() else None
    done = process.of_all(state["progress"]["iteration"] if state else 0)
    if len(set(done)) > 1:
        raise UserError(f"the processes would go on from different iterations ({min(done):.0f} to {max(done):.0f}); "
                        "--model_dir must be one folder that all machines share")
    if state is None and (state_path.exists() or training_state.holds_checkpoint(folder)):
        way = "add --resume to go on with it" if state_path.exists() else "it left no state to resume from"
        raise UserError(f"{folder} holds an earlier run; {way}, or train into another --model_dir")
    crops = TrainingCrops(args.train_dir, args.patch_size, args.seed, process.rank)
    if process.is_main:
        files.make_folder(folder, "--model_dir")
        files.make_folder(args.log_dir, "--log_dir")
    net = IDM(**state["network"]) if state else build_network(args, process)
    if args.patch_size % (multiple := math.lcm(args.block_size, net.size_multiple)):
        raise UserError(f"--patch_size must be a multiple of {multiple} here, not {args.patch_size}")
    with memory_suffices(f"for the network on {process.device}; choose another --device"):
        net.to(process.device).invertible = args.invertible
    run = Run(args, process, crops, net, torch.optim.Adam(net.parameters(), lr=args.learning_rate),
              torch.amp.GradScaler(process.device.type, enabled=args.precision == "fp16"))
    if state:
        training_state.check_configuration(state["configuration"], run.configuration, state_path)
        net.load_state_dict(state["model"])
        run.optimizer.load_state_dict(state["optimizer"])
        run.scaler.load_state_dict(state["scaler"])
        run.progress = Progress(**state["progress"])
        training_state.restore_random_states(state["random"][process.rank])
    return run


def build_network(args: argparse.Namespace, process: distributed.Process) -> IDM:
    """The network before training; all ranks get the same."""
    torch.manual_seed(args.seed)
    source, steps = args.base_model, args.step_number
    if source == "compact":
        try:
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
    """Whether `path` is a checkpoint of IDM itself: a .pkl, or a folder that `save_pretrained` wrote."""
    description = path / "config.json"
    if not description.is_file():
        return path.suffix == ".pkl"
    try:
        config = json.loads(description.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and config.get("_class_name") == "IDM"


def describe(run: Run) -> None:
    """Say on rank 0 what is about to happen."""
    args, process = run.args, run.process
    parameters = sum(parameter.numel() for parameter in run.net.parameters())
    widths = " and ".join(map(str, run.net.config.block_out_channels))
    stop = f", stopping after {args.max_iters} in all" if args.max_iters else ""
    start = f"iteration {run.progress.iteration} of its state" if run.progress.iteration else "the beginning"
    process.print(f"""\
pictures   {len(run.crops.pictures)} in {args.train_dir}; crops of {args.patch_size}x{args.patch_size}
network    {parameters:,} parameters, widths {widths}, T = {args.step_number}, from {args.base_model}
operator   ratio {" / ".join(map(str, args.cs_ratio))}, block size {args.block_size}
training   {args.epoch} epochs of {args.iters_per_epoch} iterations{stop}; batch {args.batch_size} a process
           lr {args.learning_rate:g} ({args.lr_schedule}), seed {args.seed}
           {process.world_size} process(es) on {process.device.type}, {args.precision}, invertible: {args.invertible}
files      {run.folder}, {run.log}; from {start}""")
    if run.crops.notice:
        process.print(f"note: {run.crops.notice}")


def train(run: Run) -> None:
    """Epoch after epoch until the last iteration, or until a signal asks to stop."""
    args, process, progress = run.args, run.process, run.progress
    if progress.iteration >= run.last_iteration:
        process.print("nothing is left to do")
        return
    testset = open_testset(run)
    model = process.wrap(run.net.train())
    matrices = {ratio: sampling_matrix(ratio, args.block_size, args.seed + process.rank).to(process.device)
                for ratio in args.cs_ratio}
    numbers = range(progress.iteration * args.batch_size, run.last_iteration * args.batch_size)
    loader = DataLoader(run.crops, args.batch_size, sampler=numbers, num_workers=args.num_workers,
                        worker_init_fn=distributed.ignore_interrupts, pin_memory=process.device.type == "cuda")
    with distributed.stop_on_signal() as stop_asked:
        batches = iter(loader)  # in here, so that Ctrl-C does not end a worker that is only starting
        while progress.iteration < run.last_iteration:
            start = time.monotonic(), progress.iteration
            if not train_epoch(run, model, matrices, batches, stop_asked):
                save_state(run)
                run.report(f"stopped by a signal after iteration {progress.iteration}; --resume goes on from there")
                return
            finish_epoch(run, testset, *start)


def train_epoch(
    run: Run,
    model: nn.Module,  # run.net, or DistributedDataParallel around it
    matrices: dict[float, Tensor],  # Φ for each ratio
    batches: Iterator[Tensor],  # (batch, 1, P, P) uint8
    stop_asked: threading.Event,
) -> bool:
    """Train to the end of the epoch or of the run; False where a signal stopped it before."""
    args, process, progress = run.args, run.process, run.progress
    epoch, done = divmod(progress.iteration, args.iters_per_epoch)
    length = min(args.iters_per_epoch, run.last_iteration - epoch * args.iters_per_epoch)
    saved = time.monotonic()
    with tqdm(total=length, initial=done, desc=f"[{epoch + 1:02d}/{args.epoch}]", leave=False,
              disable=None if process.is_main else True) as bar:
        for _ in range(done, length):
            save_due = process.is_main and time.monotonic() - saved > 60 * args.save_minutes
            with memory_suffices("for a training step: choose a smaller --batch_size or --patch_size, or "
                                 "--invertible both"):
                loss = backward(run, model, matrices, next(batches))
                # One small all-reduce and one wait for the device; all ranks read the same and act alike.
                loss, norm, stop, save_due = process.sum(
                    [loss / process.world_size, gradient_norm(run), stop_asked.is_set(), save_due])
                update(run, loss, math.isfinite(loss) and math.isfinite(norm))
            bar.set_postfix_str(f"loss {loss:.4f}", refresh=False)
            bar.update()
            if stop:
                return progress.iteration == epoch * args.iters_per_epoch + length
            if save_due:
                save_state(run)
                saved = time.monotonic()
    return True


def backward(run: Run, model: nn.Module, matrices: dict[float, Tensor], pixels: Tensor) -> Tensor:
    """Gradients of mean |x̂ − x| for one batch, measured through a fresh permutation; returns the loss."""
    args, process = run.args, run.process
    # Every draw depends on the iteration alone, so that a resumed run repeats what an uninterrupted one would do.
    shared = torch.Generator().manual_seed(distributed.seed_of(args.seed, run.progress.iteration))
    own = torch.Generator().manual_seed(distributed.seed_of(args.seed, run.progress.iteration, process.rank))
    ratio = args.cs_ratio[int(torch.randint(len(args.cs_ratio), (), generator=shared))]
    symmetry = int(torch.randint(8, (), generator=own))
    permutation = torch.randperm(args.patch_size**2, generator=own).to(process.device)
    operator = BlockCompressedSensing(matrices[ratio], permutation, (args.patch_size, args.patch_size))

    x = pixels.to(process.device, non_blocking=True).float() / 255
    x = x.rot90(symmetry % 4, (2, 3))
    x = x.flip(3) if symmetry >= 4 else x
    with torch.autocast(process.device.type, PRECISIONS[args.precision], enabled=args.precision != "fp32"):
        x_hat = model(operator.A(x), operator)
    loss = (x_hat.float() - x).abs().mean()
    run.scaler.scale(loss).backward()
    return loss.detach()


def gradient_norm(run: Run) -> Tensor | float:
    """Norm of all gradients; 0 with a gradient scaler, which has a check of its own."""
    if run.scaler.is_enabled():
        return 0.0
    gradients = [parameter.grad for parameter in run.net.parameters() if parameter.grad is not None]
    return torch.nn.utils.get_total_norm(gradients) / run.process.world_size


def update(run: Run, loss: float, finite: bool) -> None:
    """One step of Adam, or none where the numbers are not finite."""
    progress = run.progress
    if finite:
        for group in run.optimizer.param_groups:
            group["lr"] = learning_rate(run.args, progress.iteration)
        scale = run.scaler.get_scale()
        run.scaler.step(run.optimizer)
        run.scaler.update()
        finite = run.scaler.get_scale() >= scale  # a gradient that overflowed has lowered it, and made no step
    if finite:
        progress.loss_sum += loss
        progress.loss_count += 1
        progress.skipped_in_a_row = 0
    else:
        progress.skipped += 1
        progress.skipped_in_a_row += 1
        if progress.skipped_in_a_row == GIVE_UP_AFTER:
            sys.exit(1 if not run.process.is_main else
                     f"error: no finite loss or gradient in {GIVE_UP_AFTER} iterations in a row, up to iteration "
                     f"{progress.iteration + 1}; the last state is kept; try a smaller --learning_rate or "
                     "--precision fp32")
    run.optimizer.zero_grad()
    progress.iteration += 1


def finish_epoch(run: Run, testset: list[Picture], started: float, first: int) -> None:
    """Report, save and test after an epoch, or after the part of one that `--max_iters` leaves."""
    args, progress = run.args, run.progress
    epoch = math.ceil(progress.iteration / args.iters_per_epoch)
    label = f"[{epoch:02d}/{args.epoch}]"
    seconds = time.monotonic() - started
    images = (progress.iteration - first) * args.batch_size * run.process.world_size
    loss = progress.loss_sum / progress.loss_count if progress.loss_count else math.nan
    skipped = f", {progress.skipped} iterations skipped so far (not finite)" if progress.skipped else ""
    run.report(f"{label} loss: {loss:.4f}, lr: {learning_rate(args, progress.iteration - 1):.1e}, "
               f"{images / seconds:.1f} images/s, {seconds:.0f} s{skipped}")
    if progress.iteration % args.iters_per_epoch == 0:
        progress.loss_sum, progress.loss_count = 0.0, 0
    # Where an epoch was taken up in its middle, --max_iters may have left a checkpoint of its first part.
    due = epoch % args.save_interval == 0 or progress.iteration == run.last_iteration or first % args.iters_per_epoch
    if run.process.is_main and due:
        training_state.save_checkpoint(run.net, run.folder, epoch)
    save_state(run)  # after the checkpoint: what a state counts as done is all there
    for ratio in args.cs_ratio if testset else []:
        run.report(f"{label} {args.testset_name}, ratio {ratio:g}: {test(run, testset, ratio)}")


def open_testset(run: Run) -> list[Picture]:
    """The pictures to test on, read on rank 0; none where there is no such set."""
    if not run.process.is_main:
        return []
    try:
        return load_testset(run.args.testset_name, run.args.data_dir)
    except UserError as error:
        run.process.print(f"note: no test after each epoch, since {error}")
        return []


def test(run: Run, testset: list[Picture], ratio: float) -> str:
    """Average scores of the network as it is, or why there are none: a test does not end a training run."""
    args = run.args
    run.net.eval()
    try:
        scores = mean_scores(evaluate(run.net, testset, ratio, args.block_size, args.seed, run.process.device,
                                      args.precision, run.net.size_multiple))
    except UserError as error:
        return f"test skipped: {error}"
    finally:
        run.net.train()
    return f"PSNR {scores.psnr:.2f} dB, SSIM {scores.ssim:.4f}"


def save_state(run: Run) -> None:
    """All that `--resume` needs; every rank must call it."""
    random = run.process.gather(training_state.random_states())
    if run.process.is_main:
        training_state.save_state(run.folder / "state.pt", {
            "configuration": run.configuration,
            "network": {name: value for name, value in run.net.config.items() if not name.startswith("_")},
            "model": run.net.state_dict(),
            "optimizer": run.optimizer.state_dict(),
            "scaler": run.scaler.state_dict(),
            "progress": asdict(run.progress),
            "random": random,
        })


if __name__ == "__main__":
    errors.run(main, WeightsError)
