"""Measure the pictures of a test set, reconstruct them and score the results (paper, section 4.1).

What a picture scores depends on the picture, its file's name, the network and the protocol: not on the others.
"""
import inspect
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from utils.data.images import pad_to_multiple
from utils.data.testsets import Picture
from utils.devices import computing_in, memory_suffices
from utils.distributed import Process
from utils.errors import UserError
from utils.evaluation.metrics import Metric, Psnr, Ssim
from utils.evaluation.protocol import Protocol
from utils.evaluation.spreading import cost, spread
from utils.measurement import Measurement

Network = Callable[..., Tensor]  # (y, operator) -> x_hat (batch, 1, H, W); it may take noise_level=σ (batch,) as well
Metrics = Mapping[str, Metric]  # by name, as in METRICS
STANDARD: Metrics = MappingProxyType({"psnr": Psnr(), "ssim": Ssim()})


@dataclass(frozen=True, eq=False)
class Result:
    """A reconstruction and its scores."""

    name: str
    scores: dict[str, float]  # of the metrics that score single pictures, by name
    seconds: float  # the reconstruction alone, without reading, measuring and scoring
    density: float  # numbers measured for each pixel of the picture
    reconstruction: np.ndarray | None  # luminance, float32 (H, W) in [0, 255], not rounded; nan where not finite

    @property
    def psnr(self) -> float:
        """In dB; inf where exact, nan where the network's output was not finite."""
        return self.scores["psnr"]

    @property
    def ssim(self) -> float:
        """Nan also for pictures smaller than SSIM's window, 7×7."""
        return self.scores["ssim"]


@dataclass(frozen=True)
class Scores:
    """What a test set scores."""

    values: dict[str, float]  # by metric
    seconds: float = 0.0  # an image
    density: float = 0.0  # numbers measured for each pixel
    count: int = 1  # images

    @property
    def psnr(self) -> float:
        return self.values["psnr"]

    @property
    def ssim(self) -> float:
        return self.values["ssim"]


@dataclass(frozen=True, eq=False)
class Measured:
    """What is known of a batch of pictures of one padded size."""

    y: Tensor
    operator: nn.Module
    noise_level: Tensor | None  # σ (batch,)
    numbers: float  # in y, of a picture


def measure(pictures: list[Picture], measurement: Measurement, shared: Mapping[str, Any],
            device: torch.device) -> Measured:
    """Measure pictures of one padded size, each by its own operator; `shared` is what `measurement.shared` drew."""
    files = [picture.file or picture.name for picture in pictures]
    x = torch.stack([pad_to_multiple(torch.from_numpy(picture.luminance)[None].float() / 255, measurement.side_multiple)
                     for picture in pictures]).to(device)
    operator = measurement.draw_for(files, x.shape[-2:], shared).to(device)
    y = operator.A(x)
    numbers = operator.measured(y)
    y, noise_level = measurement.add_noise(y, [measurement.generator(file, "noise") for file in files])
    return Measured(y, operator, noise_level, numbers)


def reconstruct(net: "Reconstructor", pictures: list[Picture], protocol: Protocol) -> tuple[Tensor, float, float]:
    """Measure pictures of one padded size and recover them from their measurements alone.

    Returns x_hat (batch, 1, H, W), the seconds it took, and how many numbers were measured of an image.
    """
    measured = measure(pictures, protocol.measurement, net.shared, net.device)
    x_hat, seconds = net(measured.y, measured.operator, measured.noise_level)
    return x_hat, seconds, measured.numbers


def evaluate(
    net: Network,  # an nn.Module should be in eval mode, on `device`
    pictures: Sequence[Picture],
    protocol: Protocol,
    device: str | torch.device = "cpu",
    metrics: Metrics = STANDARD,
) -> Iterator[Result]:
    """Reconstruct pictures from their measurements, batch after batch, yielding the results as they are there.

    Batches are in the order of their first pictures; with `batch_size` 1 that is the order of the pictures.
    Raises UserError where memory runs out, or the operator refuses its settings or a picture's size.
    """
    device = torch.device(device)
    jobs = protocol.batches(pictures, device)
    return _evaluate(net, [[pictures[number] for number in job] for job in jobs], protocol, device, metrics)


def evaluate_spread(
    process: Process,  # this one of those that all call this function, with the same pictures and protocol
    net: Network,
    pictures: Sequence[Picture],
    protocol: Protocol,
    metrics: Metrics = STANDARD,
    each: Callable[[Picture, Result], None] | None = None,  # gets every result as it is there, on its own process
) -> list[Result]:
    """`evaluate` on `process.device`, the batches spread over the processes by cost.

    Returns the scores of all pictures in their order, the same list on every process; reconstructions are not in it
    (None), since `each` has had them. Batches do not depend on the number of processes, hence the scores do not, as
    long as each has as many threads.
    Raises what `evaluate` and `each` raise; and where one process fails, so do all, that none waits for it.
    """
    _check_same_pictures(process, pictures)
    sizes, jobs = protocol.sizes(pictures), protocol.batches(pictures, process.device)
    costs = [sum(cost(sizes[number]) for number in job) for job in jobs]
    mine = [jobs[number] for number in spread(costs, process.world_size)[process.rank]]
    stream = _evaluate(net, [[pictures[number] for number in job] for job in mine], protocol, process.device, metrics)
    scores, failure = {}, None
    try:
        for number, result in zip(itertools.chain(*mine), stream, strict=True):
            if each is not None:
                each(pictures[number], result)
            scores[number] = replace(result, reconstruction=None)
    except Exception as error:
        failure = error
    _raise_failures(process, failure)
    everything = {number: result for part in process.all_gather(scores) for number, result in part.items()}
    return [everything[number] for number in range(len(pictures))]


def mean_scores(results: Iterable[Result], metrics: Metrics = STANDARD) -> Scores:
    """Return what the set scores; a nan or inf among the results shows in it. Every process must call it.

    Raises ValueError where there are no results.
    """
    results = list(results)
    if not results:
        raise ValueError("there are no results to average")
    values = {name: metric.of_set([result.scores[name] for result in results if name in result.scores])
              for name, metric in metrics.items()}
    seconds, density = np.mean([(result.seconds, result.density) for result in results], axis=0).tolist()
    return Scores(values, seconds, density, len(results))


def _evaluate(net: Network, jobs: list[list[Picture]], protocol: Protocol, device: torch.device,
              metrics: Metrics) -> Iterator[Result]:
    reconstructor = Reconstructor(net, protocol, device)
    for batch in jobs:
        with memory_suffices(_purpose(batch, device)):
            x_hat, seconds, measured = reconstruct(reconstructor, batch, protocol)
        for picture, found in zip(batch, x_hat, strict=True):
            yield score(picture, found, seconds / len(batch), measured, metrics)


def score(picture: Picture, x_hat: Tensor, seconds: float, numbers: float, metrics: Metrics = STANDARD) -> Result:
    """Return the result of a picture, of which `numbers` numbers were measured, from x_hat (1, H, W)."""
    truth, found = picture.luminance, in_255(x_hat, picture.luminance.shape)
    scores = {name: metric(truth, found) for name, metric in metrics.items()}
    return Result(picture.name, {name: value for name, value in scores.items() if value is not None},
                  seconds, numbers / truth.size, found)


def in_255(x: Tensor, shape: tuple[int, int]) -> np.ndarray:
    """Return an image (1, H, W) in [0, 1] as luminance in [0, 255], float32, without padding.

    Clamping would make a plausible white of an overflow: what is not finite becomes nan, and so does the score.
    """
    x = x[0, :shape[0], :shape[1]].float()
    return torch.where(x.isfinite(), x.clamp(0, 1) * 255, torch.nan).cpu().numpy()


class Reconstructor:
    """A network in the precision of a protocol, on its device, with what the operators share, and a clock."""

    def __init__(self, net: Network, protocol: Protocol, device: torch.device):
        self.net, self.precision, self.device = net, protocol.precision, device
        self.shared = protocol.measurement.shared(device)
        self.compiled = isinstance(net, nn.Module) and any(module._compiled_call_impl for module in net.modules())
        self.tried: set[tuple[int, ...]] = set()  # shapes

    def __call__(self, y: Tensor, operator: nn.Module, noise_level: Tensor | None) -> tuple[Tensor, float]:
        """Return x_hat and the seconds that it took."""
        told = settings_for(self.net, noise_level)
        # The first time on a GPU also loads and chooses kernels; the first time of each size also compiles.
        first = tuple(operator.A_adjoint(y).shape) if self.compiled else ()
        if (self.compiled or self.device.type == "cuda") and first not in self.tried:
            self._reconstruct(y, operator, told)
            self.tried.add(first)
        start = _clock(self.device)
        x_hat = self._reconstruct(y, operator, told)
        return x_hat, _clock(self.device) - start

    @torch.inference_mode()
    def _reconstruct(self, y: Tensor, operator: nn.Module, told: dict[str, Any]) -> Tensor:
        with computing_in(self.precision, self.device):
            return self.net(y, operator, **told)


def settings_for(net: Network, noise_level: Tensor | None) -> dict[str, Tensor]:
    """Return σ as a keyword argument for a network that takes it."""
    function = net.forward if isinstance(net, nn.Module) else net
    takes_it = "noise_level" in inspect.signature(function).parameters
    return {"noise_level": noise_level} if takes_it and noise_level is not None else {}


def _purpose(batch: list[Picture], device: torch.device) -> str:
    """What memory is needed for, and what to do where there is not enough."""
    (height, width), others = batch[0].luminance.shape, len(batch) - 1
    if others:
        return (f"to reconstruct {batch[0].name} ({height}x{width}) and {others} more of its size together on "
                f"{device}: choose a smaller --batch_size")
    return (f"to reconstruct {batch[0].name} ({height}x{width}) on {device}: crop it, or choose another --device or "
            "--precision")


def _check_same_pictures(process: Process, pictures: Sequence[Picture]) -> None:
    lists = process.all_gather([(picture.name, picture.luminance.shape) for picture in pictures])
    if any(other != lists[0] for other in lists):
        raise UserError("the processes found different pictures; --data_dir must be one folder that all machines share")


def _raise_failures(process: Process, failure: Exception | None) -> None:
    """Raise this process's failure, else another's: of the user's mistakes the sentence, of others where to look."""
    said = process.all_gather(failure and (isinstance(failure, UserError), str(failure)))
    if failure is not None:
        raise failure
    for rank, (mistake, message) in ((rank, what) for rank, what in enumerate(said) if what):
        raise UserError(message) if mistake else RuntimeError(f"process {rank} failed: {message}")


def _clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
