"""What a training run prints and logs: at its start, while an epoch goes on, and after each."""
import math
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from model.operators import dagger
from utils.data.images import in_8_bits
from utils.data.testsets import Picture
from utils.errors import UserError
from utils.evaluation.evaluate import Result, evaluate, evaluate_spread, mean_scores
from utils.evaluation.protocol import Protocol
from utils.measurement import Measurement
from utils.training.learning_rate import learning_rate
from utils.training.run import Run

POINTS = 50  # of TensorBoard's curves in an epoch
SCALARS = 16  # numbers of a parameter that the record holds
STRIPS = 4  # test pictures that TensorBoard shows


def opening(run: Run, notes: list[str]) -> str:
    """All that matters about what is about to happen."""
    settings, process = run.settings, run.process
    device = torch.cuda.get_device_name(process.device) if process.device.type == "cuda" else process.device.type
    extras = [f"invertible: {settings.invertible}"] if "invertible" not in settings.without else []
    extras += ["compiled"] * settings.compile
    extras += ([f"clipped at {settings.clip:g}"] if settings.clip else []) + (
        [f"ema {settings.ema:g}"] if settings.ema else [])
    share = f"{run.batches} batch(es) of {settings.batch_size}" + (
        f" ({process.world_size} process(es), {settings.accumulate} each)" if settings.accumulate > 1 else "")
    warm_up = f", warm-up over {settings.warm_up}" if settings.warm_up else ""
    stop = f", stopping after {settings.max_iters} in all" if settings.max_iters else ""
    start = f"iteration {run.progress.iteration} of its state" if run.progress.iteration else "the beginning"
    length = f"{settings.epoch} epochs of {settings.iters_per_epoch} iterations{stop}"
    side = settings.patch_size
    lines = [
        ("pictures", f"{len(run.crops.names)} in {settings.train_dir}; crops of {side}x{side}"),
        *settings.described(run.net, run.progress.before),
        ("training", f"{length}; an iteration is {share}"),
        ("", f"learning rate {settings.learning_rate:g} ({settings.lr_schedule}{warm_up}), seed {settings.seed}"),
        ("machine", f"{process.world_size} process(es) on {device}, {settings.precision}, {', '.join(extras)}"),
        ("tests", f"{len(run.testset)} picture(s) of {settings.testset_name} after each epoch, at "
                  f"{' / '.join(map(title, settings.tested()))}" if run.testset else "none"),
        ("files", f"{settings.folder}, {settings.log_dir / settings.name}.txt; from {start}"),
        *(("note", note) for note in notes if note),
    ]
    return "\n".join(f"{name:10} {text}" for name, text in lines)


class Epoch:
    """The part of an epoch that is trained without a break: its length, its bar, and what is measured of it."""

    def __init__(self, run: Run):
        self.run, self.start = run, run.progress.iteration
        self.number = self.start // run.settings.iters_per_epoch + 1
        self.end = min(self.number * run.settings.iters_per_epoch, run.settings.last_iteration)
        self.label = f"[{self.number:02d}/{run.settings.epoch}]"
        self.started, self.norm = time.monotonic(), math.nan

    def bar(self) -> tqdm:
        done, begin = self.start, (self.number - 1) * self.run.settings.iters_per_epoch
        return tqdm(total=self.end - begin, initial=done - begin, desc=self.label, leave=False,
                    disable=None if self.run.process.is_main else True)

    def point(self, loss: Tensor, norm: Tensor) -> None:
        """A point of TensorBoard's curves, now and then: it makes this process wait for the device."""
        iteration, settings = self.run.progress.iteration, self.run.settings
        if self.run.log and (iteration % math.ceil(settings.iters_per_epoch / POINTS) == 0 or iteration == self.end):
            self.norm = float(norm)
            self.run.log.scalars(iteration, {"loss": float(loss), "optimizer/gradient norm": self.norm,
                                             "optimizer/learning rate": learning_rate(settings, iteration - 1)})

    def images_per_second(self) -> float:
        images = (self.run.progress.iteration - self.start) * self.run.batches * self.run.settings.batch_size
        return images / (time.monotonic() - self.started)

    def show(self, bar: tqdm, loss: Tensor) -> None:
        if not bar.disable:
            bar.set_postfix_str(f"loss {float(loss):.4f}, {self.images_per_second():.1f} images/s", refresh=False)

    def record(
        self,
        waited: float,  # seconds for data
    ) -> dict[str, Any]:
        """What there is to say after it; `run.read_totals` comes first."""
        run, progress = self.run, self.run.progress
        seconds = time.monotonic() - self.started
        scalars = {name: parameter.item() for name, parameter in run.net.named_parameters()
                   if name.endswith(".v") and parameter.numel() == 1}
        # A DDPM has no schedule to learn.
        learned = run.net.schedule.named_parameters() if hasattr(run.net, "schedule") else ()
        schedule = {name: parameter.tolist() for name, parameter in learned
                    if "." not in name and parameter.numel() <= SCALARS}
        return {
            "epoch": self.number,
            "iteration": progress.iteration,
            "loss": progress.loss_sum / progress.loss_count if progress.loss_count else math.nan,
            "learning_rate": learning_rate(run.settings, progress.iteration - 1),
            "gradient_norm": self.norm,
            "skipped": progress.skipped,
            "seconds": seconds,
            "images_per_second": self.images_per_second(),
            "data_wait": waited / seconds,
            "peak_memory_mb": peak_memory(run) / 1e6,
            **schedule,  # alpha, or what another schedule learns
            "v": scalars,
        }


def summary(run: Run, record: dict[str, Any]) -> str:
    skipped = f", {record['skipped']} iterations skipped so far (not finite)" if record["skipped"] else ""
    return (f"[{record['epoch']:02d}/{run.settings.epoch}] loss: {record['loss']:.4f}, "
            f"lr: {record['learning_rate']:.1e}, {record['images_per_second']:.1f} images/s, "
            f"{record['seconds']:.0f} s, {100 * record['data_wait']:.1f} % of it waiting for data, "
            f"{record['peak_memory_mb']:.0f} MB{skipped}")


def test_and_log(run: Run, record: dict[str, Any] | None, stop: threading.Event) -> bool:
    """Report an epoch, test after it and log its record, unless the log has it; every rank must call it.

    A state holds the record, so that a run that was killed or stopped here does all of it when it is taken up again.
    Returns False where `stop`, which a signal sets, has ended it.
    """
    logged = bool(run.log and run.log.iteration == run.progress.iteration)
    if record is None or any(run.process.all_gather(logged)):
        return True
    run.report(summary(run, record))
    record["tests"] = {}
    for measurement in run.settings.tested() if run.testset else []:
        record["tests"][title(measurement)] = test(run, measurement, stop)
        if any(run.process.all_gather(stop.is_set())):
            return False
    if run.log:
        run.log.scalars(record["iteration"], curves(run, record))
        run.log.record(record)
    return True


def curves(run: Run, record: dict[str, Any]) -> dict[str, float]:
    """Points of TensorBoard's curves, which it shows in the order of their names: after the loss, what matters less."""
    points = {"optimizer/skipped iterations": record["skipped"], "machine/images per second": record[
        "images_per_second"], "machine/waiting for data": record["data_wait"],
        "machine/peak memory, MB": record["peak_memory_mb"]}
    for ratio, scores in record["tests"].items():
        points |= {f"{name}/{run.settings.testset_name} at {ratio}": value for name, value in scores.items()}
    points |= {f"schedule/{name} {t}": value for name, values in record.items() if isinstance(values, list)
               for t, value in enumerate(values, start=1)}
    return points | {f"v/{name.removesuffix('.v')}": value for name, value in record["v"].items()}


def title(measurement: Measurement) -> str:
    """What a measurement is called in the logs: by its ratio, or by its operator's name and settings."""
    return f"{measurement.settings['cs_ratio']:g}" if measurement.operator == "cs" else measurement.name


def test(run: Run, measurement: Measurement, stop: threading.Event) -> dict[str, float]:
    """Average scores of the network as it is, and a few pictures for TensorBoard; every rank must call it.

    Returns nothing, and says why, where the test fails: that does not end a training run.
    """
    settings, net, iteration = run.settings, run.best, run.progress.iteration
    epoch = math.ceil(iteration / settings.iters_per_epoch)
    name = "ratio " * (measurement.operator == "cs") + title(measurement)
    label = f"[{epoch:02d}/{settings.epoch}] {settings.testset_name}, {name}"
    protocol, strips = Protocol(measurement, settings.precision), {}

    def check(*_: Any) -> None:
        if stop.is_set():
            raise UserError("a signal asks the run to end")

    def each(picture: Picture, result: Result) -> None:
        check()  # compiled networks have no hooks
        if picture in run.testset[:STRIPS]:
            (back,) = evaluate(lambda y, operator: dagger(operator, y), [picture], protocol)
            strips[picture.name] = in_8_bits(np.hstack([back.reconstruction, result.reconstruction,
                                                        picture.luminance]))

    net.eval()
    try:
        with calling(check, nn.Module() if settings.compile else net):  # a picture may take minutes
            results = evaluate_spread(run.process, net, run.testset, protocol, each=each)
    except UserError as error:
        if not stop.is_set():
            run.report(f"{label}: test skipped: {error}")
        return {}
    finally:
        run.net.train()
    scores = mean_scores(results)
    run.report(f"{label}: PSNR {scores.psnr:.2f} dB, SSIM {scores.ssim:.4f}")
    for name, strip in ((name, strip) for part in run.process.gather(strips) for name, strip in part.items()):
        run.log.picture(iteration, f"back-projection, reconstruction, truth at {title(measurement)}/{name}", strip)
    return {"psnr": scores.psnr, "ssim": scores.ssim}


@contextmanager
def calling(check: Callable[..., None], net: nn.Module) -> Iterator[None]:
    """Have `check` called before whatever a module of `net` computes."""
    hooks = [module.register_forward_pre_hook(check) for module in net.modules()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def peak_memory(run: Run) -> int:
    """Bytes: the device's where that counts them, else the process's."""
    if run.process.device.type == "cuda":
        return torch.cuda.max_memory_allocated(run.process.device)
    try:
        import resource
    except ImportError:  # on Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
