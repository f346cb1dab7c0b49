"""What a training run prints and logs: at its start, while an epoch goes on, and after each."""
import math
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from utils.data.testsets import Picture
from utils.errors import UserError
from utils.evaluation.evaluate import Result, evaluate, evaluate_spread, mean_scores
from utils.training.learning_rate import learning_rate
from utils.training.run import Run

POINTS = 50  # of TensorBoard's curves in an epoch
STRIPS = 4  # test pictures that TensorBoard shows


def opening(run: Run, notes: list[str]) -> str:
    """All that matters about what is about to happen."""
    args, process, net = run.args, run.process, run.net
    parameters = sum(parameter.numel() for parameter in net.parameters())
    device = torch.cuda.get_device_name(process.device) if process.device.type == "cuda" else process.device.type
    extras = [f"invertible: {args.invertible}", *(["compiled"] if args.compile else []),
              *([f"clipped at {args.clip:g}"] if args.clip else []), *([f"ema {args.ema:g}"] if args.ema else [])]
    share = f"{run.batches} batch(es) of {args.batch_size}" + (
        f" ({process.world_size} process(es), {args.accumulate} each)" if args.accumulate > 1 else "")
    warm_up = f", warm-up over {args.warm_up}" if args.warm_up else ""
    stop = f", stopping after {args.max_iters} in all" if args.max_iters else ""
    start = f"iteration {run.progress.iteration} of its state" if run.progress.iteration else "the beginning"
    lines = [
        ("pictures", f"{len(run.crops.names)} in {args.train_dir}; crops of {args.patch_size}x{args.patch_size}"),
        ("network", f"{parameters:,} parameters, widths {' and '.join(map(str, net.config.block_out_channels))}, "
                    f"T = {args.step_number}, from {args.base_model}"),
        ("operator", f"ratio {args.cs_ratio}, block size {args.block_size}"),
        ("training", f"{args.epoch} epochs of {args.iters_per_epoch} iterations{stop}; an iteration is {share}"),
        ("", f"learning rate {args.learning_rate:g} ({args.lr_schedule}{warm_up}), seed {args.seed}"),
        ("machine", f"{process.world_size} process(es) on {device}, {args.precision}, {', '.join(extras)}"),
        ("tests", f"{len(run.testset)} picture(s) of {args.testset_name} after each epoch, at "
                  f"{' / '.join(f'{ratio:g}' for ratio in args.cs_ratio.to_test)}" if run.testset else "none"),
        ("files", f"{run.folder}, {args.log_dir / args.run_name}.txt; from {start}"),
        *(("note", note) for note in notes if note),
    ]
    return "\n".join(f"{name:10} {text}" for name, text in lines)


class Epoch:
    """The part of an epoch that is trained without a break: its length, its bar, and what is measured of it."""

    def __init__(self, run: Run):
        self.run, self.start = run, run.progress.iteration
        self.number = self.start // run.args.iters_per_epoch + 1
        self.end = min(self.number * run.args.iters_per_epoch, run.last_iteration)
        self.label = f"[{self.number:02d}/{run.args.epoch}]"
        self.started, self.waited, self.norm = time.monotonic(), 0.0, math.nan

    def bar(self) -> tqdm:
        done, begin = self.start, (self.number - 1) * self.run.args.iters_per_epoch
        return tqdm(total=self.end - begin, initial=done - begin, desc=self.label, leave=False,
                    disable=None if self.run.process.is_main else True)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around what waits for data."""
        start = time.monotonic()
        yield
        self.waited += time.monotonic() - start

    def point(self, loss: Tensor, norm: Tensor) -> None:
        """A point of TensorBoard's curves, now and then: it makes this process wait for the device."""
        iteration, args = self.run.progress.iteration, self.run.args
        if self.run.log and (iteration % math.ceil(args.iters_per_epoch / POINTS) == 0 or iteration == self.end):
            self.norm = float(norm)
            self.run.log.scalars(iteration, loss=float(loss), gradient_norm=self.norm,
                                 learning_rate=learning_rate(args, iteration - 1))

    def images_per_second(self) -> float:
        images = (self.run.progress.iteration - self.start) * self.run.batches * self.run.args.batch_size
        return images / (time.monotonic() - self.started)

    def show(self, bar: tqdm, loss: Tensor) -> None:
        if not bar.disable:
            bar.set_postfix_str(f"loss {float(loss):.4f}, {self.images_per_second():.1f} images/s", refresh=False)

    def record(self) -> dict[str, Any]:
        """What there is to say after it; `run.read_totals` comes first."""
        run, progress = self.run, self.run.progress
        seconds = time.monotonic() - self.started
        scalars = {name: parameter.item() for name, parameter in run.net.named_parameters()
                   if name.endswith(".v") and parameter.numel() == 1}
        alphas = run.net.schedule.alpha.tolist()
        return {
            "epoch": self.number,
            "iteration": progress.iteration,
            "loss": progress.loss_sum / progress.loss_count if progress.loss_count else math.nan,
            "learning_rate": learning_rate(run.args, progress.iteration - 1),
            "gradient_norm": self.norm,
            "skipped": progress.skipped,
            "seconds": seconds,
            "images_per_second": self.images_per_second(),
            "data_wait": self.waited / seconds,
            "peak_memory_mb": peak_memory(run) / 1e6,
            "alpha": alphas,
            "v": scalars,
        }


def summary(run: Run, record: dict[str, Any]) -> str:
    skipped = f", {record['skipped']} iterations skipped so far (not finite)" if record["skipped"] else ""
    return (f"[{record['epoch']:02d}/{run.args.epoch}] loss: {record['loss']:.4f}, lr: {record['learning_rate']:.1e}, "
            f"{record['images_per_second']:.1f} images/s, {record['seconds']:.0f} s, "
            f"{100 * record['data_wait']:.1f} % of it waiting for data, {record['peak_memory_mb']:.0f} MB{skipped}")


def test_and_log(run: Run) -> None:
    """Report an epoch, test after it and log its record, unless the log has it; every rank must call it.

    A state holds the record, so that a run that was killed here does both when it is taken up again.
    """
    record, run.unlogged = run.unlogged, None
    logged = bool(run.log and run.log.iteration == run.progress.iteration)
    if record is None or any(run.process.all_gather(logged)):
        return
    run.report(summary(run, record))
    record["tests"] = test_all(run)
    if not run.log:
        return
    curves = {name: record[name] for name in ("images_per_second", "data_wait", "peak_memory_mb", "skipped")}
    curves |= {f"alpha/{t}": alpha for t, alpha in enumerate(record["alpha"], start=1)}
    curves |= {f"v/{name.removesuffix('.v')}": value for name, value in record["v"].items()}
    for ratio, scores in record["tests"].items():
        curves |= {f"{name}/{run.args.testset_name} at {ratio}": value for name, value in scores.items()}
    run.log.scalars(record["iteration"], **curves)
    run.log.record(record)


def test_all(run: Run) -> dict[str, dict[str, float]]:
    """The scores at each ratio, by ratio; every rank must call it."""
    return {f"{ratio:g}": test(run, ratio) for ratio in (run.args.cs_ratio.to_test if run.testset else [])}


def test(run: Run, ratio: float) -> dict[str, float]:
    """Average scores of the network as it is, and a few pictures for TensorBoard; every rank must call it.

    Returns nothing, and says why, where the test fails: that does not end a training run.
    """
    args, net, iteration = run.args, run.best, run.progress.iteration
    label = f"[{math.ceil(iteration / args.iters_per_epoch):02d}/{args.epoch}] {args.testset_name}, ratio {ratio:g}"
    shown = []

    def each(picture: Picture, result: Result) -> None:
        if run.log and len(shown) < STRIPS:
            shown.append(picture)
            (back,) = evaluate(lambda y, operator: operator.A_adjoint(y), [picture], ratio, args.block_size, args.seed,
                               size_multiple=net.size_multiple)
            strip = [back.reconstruction, result.reconstruction, picture.luminance]
            run.log.strip(iteration, f"back-projection, reconstruction, truth at {ratio:g}/{picture.name}", strip)

    net.eval()
    try:
        scores = mean_scores(evaluate_spread(run.process, net, run.testset, ratio, args.block_size, args.seed,
                                             args.precision, net.size_multiple, each=each))
    except UserError as error:
        run.report(f"{label}: test skipped: {error}")
        return {}
    finally:
        run.net.train()
    run.report(f"{label}: PSNR {scores.psnr:.2f} dB, SSIM {scores.ssim:.4f}")
    return {"psnr": scores.psnr, "ssim": scores.ssim}


def peak_memory(run: Run) -> int:
    """Bytes: the device's where that counts them, else the process's."""
    if run.process.device.type == "cuda":
        return torch.cuda.max_memory_allocated(run.process.device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
