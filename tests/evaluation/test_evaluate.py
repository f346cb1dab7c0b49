"""Evaluation with networks whose scores are known in closed form."""
import math

import numpy as np
import pytest
import torch
import torch.multiprocessing as multiprocessing

from model import IDM
from model.operators import random_sampling_matrix
from tests.training.test_distributed import free_port
from utils import distributed
from utils.data.images import write_reconstruction
from utils.data.testsets import Picture, load_testset
from utils.errors import UserError
from utils.evaluation import evaluate as evaluation
from utils.evaluation.evaluate import STANDARD, Result, evaluate, evaluate_spread, mean_scores
from utils.evaluation.metrics import Metric
from utils.evaluation.protocol import Protocol
from utils.measurement import Measurement


def back_projection(y, operator):
    return operator.A_adjoint(y)


def protocol(cs_ratio=0.5, block_size=8, seed=2025, **computing) -> Protocol:
    return Protocol(Measurement(settings={"cs_ratio": cs_ratio, "block_size": block_size}, seed=seed), **computing)


def picture(name: str, height: int = 20, width: int = 30) -> Picture:
    rng = np.random.default_rng(list(name.encode()))
    return Picture(name, rng.integers(0, 256, (height, width), dtype=np.uint8))


def test_all_measurements_give_the_picture_back():
    for height, width in ((1, 1), (20, 30), (33, 64)):
        original = picture("a", height, width)
        (result,) = evaluate(back_projection, [original], protocol(1.0))
        assert result.reconstruction.shape == (height, width)
        assert result.psnr > 110  # fp32 rounding
        assert np.abs(result.reconstruction - original.luminance).max() < 1e-3
        assert math.isnan(result.ssim) if height < 7 else result.ssim > 0.999999


def test_the_back_projection_scores_as_numpy_says():
    original, block, seed = picture("Barbara", 16, 24), 8, 7
    (result,) = evaluate(back_projection, [original], protocol(0.25, block, seed))
    phi = random_sampling_matrix(0.25, block, torch.Generator().manual_seed(seed)).numpy().astype(float)
    # The first 8 bytes of `printf 7:Barbara | sha256sum`, last byte first.
    order = torch.randperm(16 * 24, generator=torch.Generator().manual_seed(0x13C1FAFFB70F3446)).numpy()
    rows = (original.luminance.flatten() / 255.0)[order].reshape(-1, block**2)
    expected = np.empty(16 * 24)
    expected[order] = (rows @ phi @ phi.T).flatten()
    expected = expected.reshape(16, 24).clip(0, 1) * 255
    assert np.abs(result.reconstruction - expected).max() < 1e-3
    error = np.mean((expected - original.luminance) ** 2)
    assert result.psnr == pytest.approx(10 * math.log10(255**2 / error), abs=1e-4)


def test_seconds_are_of_one_reconstruction_without_compiling(monkeypatch):
    """Three pictures of one size in batches of two, and one of another, on a clock that a call moves by six seconds."""
    now, sizes = [0.0], []

    class Net(torch.nn.Module):
        def forward(self, y, operator):
            now[0] += 6
            sizes.append((len(y), *operator.image_shape))
            return operator.A_adjoint(y)

    monkeypatch.setattr(evaluation, "_clock", lambda device: now[0])
    pictures = [picture(name) for name in "abc"] + [picture("d", 8, 8)]
    assert [result.seconds for result in evaluate(Net(), pictures, protocol(batch_size=2))] == [3, 3, 6, 6]
    assert sizes == [(2, 24, 32), (1, 24, 32), (1, 8, 8)]
    net = Net()
    net.compile(backend="eager")
    sizes.clear()
    results = evaluate(net, [*pictures[:2], *pictures], protocol(batch_size=2))
    assert [result.seconds for result in results] == [3, 3, 3, 3, 6, 6]
    assert sizes == [(2, 24, 32)] * 3 + [(1, 24, 32)] * 2 + [(1, 8, 8)] * 2


def test_scores_are_of_the_clamped_reconstruction_in_float():
    white, grey = Picture("w", np.full((8, 8), 255, np.uint8)), Picture("g", np.full((8, 8), 100, np.uint8))
    results = list(evaluate(lambda y, op: torch.full((1, 1, 8, 8), 1.7), [white, grey], protocol()))
    assert results[0].psnr == math.inf
    assert results[1].psnr == pytest.approx(20 * math.log10(255 / 155), abs=1e-6)
    (result,) = evaluate(lambda y, op: torch.full((1, 1, 8, 8), 100.25 / 255), [grey], protocol())
    assert result.psnr == pytest.approx(20 * math.log10(255 / 0.25), abs=1e-3)  # not rounded to whole levels


def test_pictures_are_padded_to_what_the_blocks_need_and_no_more():
    """In blocks of 31x31, 10 % of a 256x256 picture is 97 numbers for each of 81 blocks: 0.12 a pixel, and not 0.38."""
    shapes = []

    class Net(torch.nn.Module):
        size_multiple = 8

        def forward(self, y, operator):
            shapes.append((operator.image_shape, tuple(y.shape)))
            return operator.A_adjoint(y)

    (result,) = evaluate(Net(), [picture("a", 256, 256)], protocol(0.1, 31))
    assert shapes == [((279, 279), (1, 81, 97))] and result.reconstruction.shape == (256, 256)
    assert result.density == 81 * 97 / 256**2 == pytest.approx(0.1199, abs=1e-4)


def test_the_measurement_of_a_picture_does_not_depend_on_the_others():
    a, b, c = picture("a"), picture("b"), picture("c", 50, 20)
    def run(*pictures, **options):
        results = evaluate(back_projection, pictures, protocol(0.3, **options))
        return {result.name: result.reconstruction for result in results}
    together, alone, reversed_order = run(a, b, c), run(b), run(c, b, a)
    assert (together["b"] == alone["b"]).all()
    assert (together["a"] == reversed_order["a"]).all()
    assert (run(b, seed=1)["b"] != alone["b"]).any()


def test_the_measurement_of_a_picture_does_not_depend_on_its_neighbours_names(tmp_path):
    def first() -> np.ndarray:
        pictures = load_testset("set", tmp_path)
        return next(evaluate(back_projection, pictures, protocol(0.3))).reconstruction
    (tmp_path / "set").mkdir()
    write_reconstruction(tmp_path / "set" / "a.bmp.png", picture("a").luminance)
    alone = first()
    write_reconstruction(tmp_path / "set" / "a.bmp.tif", picture("b").luminance)  # now both show their suffix
    assert (first() == alone).all()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_scores_nan(value):
    def net(y, operator):
        x = operator.A_adjoint(y)
        x[0, 0, 3, 3] = value
        return x
    (result,) = evaluate(net, [picture("a")], protocol())
    assert math.isnan(result.psnr)
    assert math.isnan(result.ssim)
    assert np.isnan(result.reconstruction).sum() == 1


@pytest.mark.parametrize("precision, dtype",
                         [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_the_network_computes_in_the_precision_asked_for(precision, dtype):
    seen = []
    def net(y, operator):
        x = operator.A_adjoint(y)
        seen.extend([(torch.ones(2, 2) @ torch.ones(2, 2)).dtype, x.dtype, torch.is_inference_mode_enabled()])
        return x.to(dtype)
    (result,) = evaluate(net, [picture("a")], protocol(precision=precision))
    assert seen == [dtype, torch.float32, True]
    assert result.reconstruction.dtype == np.float32


def test_wrong_arguments_are_refused():
    for options, error, message in (({"precision": "fp8"}, ValueError, "fp8"), ({"batch_size": 0}, ValueError, "not 0"),
                                    ({"cs_ratio": 1.5}, UserError, "not 1.5"), ({"block_size": 0}, UserError, "not 0")):
        with pytest.raises(error, match=message):
            list(evaluate(back_projection, [picture("a")], protocol(**options)))


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory: you tried ..."),
])
def test_running_out_of_memory_is_said_in_a_sentence(error):
    def net(y, operator):
        raise error
    with pytest.raises(UserError, match=r"not enough memory to reconstruct a \(20x30\) on cpu"):
        list(evaluate(net, [picture("a")], protocol()))


def test_other_errors_of_the_network_pass_unchanged():
    def net(y, operator):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        list(evaluate(net, [picture("a")], protocol()))


def test_batches_hold_pictures_of_one_padded_size_in_order():
    pictures = [picture("a"), picture("b", 40, 20), picture("c", 17, 25), picture("d"), picture("e", 40, 20)]
    sizes = []
    def net(y, operator):
        sizes.append((len(y), *operator.image_shape))
        return operator.A_adjoint(y)
    batched = list(evaluate(net, pictures, protocol(0.3, batch_size=2)))
    assert sizes == [(2, 24, 32), (2, 40, 24), (1, 24, 32)]
    assert [result.name for result in batched] == ["a", "c", "b", "e", "d"]
    alone = {result.name: result for result in evaluate(net, pictures, protocol(0.3))}
    assert list(alone) == list("abcde")
    for result in batched:
        assert result.reconstruction.shape == alone[result.name].reconstruction.shape
        # Rows of Φ's product are the same sums, whichever rows are beside them.
        assert np.abs(result.reconstruction - alone[result.name].reconstruction).max() < 1e-3


def test_a_network_scores_the_same_in_batches_as_one_by_one():
    torch.manual_seed(0)
    net = IDM((32, 64), num_steps=2).eval()
    pictures = [picture(name, 24, 40) for name in "abc"]
    one, three = (list(evaluate(net, pictures, protocol(batch_size=n))) for n in (1, 3))
    for a, b in zip(one, three, strict=True):
        assert a.psnr == pytest.approx(b.psnr, abs=1e-3)
        assert np.abs(a.reconstruction - b.reconstruction).max() < 1e-2
    swapped = evaluate(net, pictures[::-1], protocol(batch_size=3))
    assert [r.psnr for r in swapped] == pytest.approx([r.psnr for r in three[::-1]], abs=1e-3)


def one_rank(rank: int, port: int, folder: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1",
                            "MASTER_PORT": port}.items():
            patch.setenv(name, str(value))
        process = distributed.start("cpu")
        try:
            seen = []
            results = evaluate_spread(process, *arguments(), each=lambda p, r: seen.append((p.name, r.reconstruction)))
            np.savez(f"{folder}/{rank}.npz", names=[name for name, _ in seen],
                     scores=[(r.psnr, r.ssim) for r in results],
                     **{f"picture_{name}": reconstruction for name, reconstruction in seen})
            expect_failures(process, rank)
        finally:
            distributed.stop()


def expect_failures(process, rank):
    """Whatever happens on one process, none waits for it, and the next evaluation works."""
    def on_rank(bad, error):
        def each(picture, result):
            if rank == bad:
                raise error
        return each
    with pytest.raises(UserError, match="the disk is full"):
        evaluate_spread(process, *arguments(), each=on_rank(1, UserError("the disk is full")))
    error, message = (ZeroDivisionError, "a bug") if rank == 0 else (RuntimeError, "process 0 failed: a bug")
    with pytest.raises(error, match=message):
        evaluate_spread(process, *arguments(), each=on_rank(0, ZeroDivisionError("a bug")))
    with pytest.raises(UserError, match="different pictures"):
        evaluate_spread(process, back_projection, [picture("a")] * (1 + rank), protocol())
    with pytest.raises(UserError, match="not enough memory to reconstruct"):
        def net(y, operator):
            if rank == 1:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return operator.A_adjoint(y)
        evaluate_spread(process, net, [picture("a"), picture("b")], protocol())
    (result,) = evaluate_spread(process, back_projection, [picture("a")], protocol(1.0))  # one for two processes
    assert result.psnr > 110


def arguments():
    torch.set_num_threads(1)
    torch.manual_seed(0)
    net = IDM((32, 64), num_steps=1).eval()
    pictures = [picture("a"), picture("b", 40, 20), picture("c", 17, 25), picture("d"), picture("e", 90, 90)]
    return net, pictures, protocol(0.3, seed=7, batch_size=2)


def test_two_processes_find_what_one_does(tmp_path):
    multiprocessing.spawn(one_rank, args=(free_port(), str(tmp_path)), nprocs=2)
    ranks = [np.load(tmp_path / f"{rank}.npz") for rank in range(2)]
    assert sorted(list(ranks[0]["names"]) + list(ranks[1]["names"])) == list("abcde")
    assert list(ranks[0]["names"]) == ["e"] or list(ranks[1]["names"]) == ["e"]  # as costly as all others
    threads = torch.get_num_threads()
    try:
        net, pictures, _ = arguments()
        alone = {r.name: r for r in evaluate(*arguments())}
    finally:
        torch.set_num_threads(threads)
    for rank in ranks:
        assert np.array_equal(rank["scores"], [(alone[p.name].psnr, alone[p.name].ssim) for p in pictures])
        for name in rank["names"]:
            assert np.array_equal(rank[f"picture_{name}"], alone[name].reconstruction)


class MeanError(Metric):
    """A score of single pictures."""

    label, higher_is_better = "ME", False

    def __call__(self, truth, reconstruction):
        return float(np.abs(truth - reconstruction).mean())


class Darkest(Metric):
    """A score of sets alone."""

    label, higher_is_better = "Dark", True

    def __init__(self):
        self.seen = []

    def __call__(self, truth, reconstruction):
        self.seen.append(truth.min())

    def of_set(self, scores):
        assert scores == []
        return float(min(self.seen))


def test_further_metrics_see_what_psnr_sees():
    pictures = [picture("a", 9, 11), picture("b", 9, 11)]
    metrics = {**STANDARD, "me": MeanError(), "dark": Darkest()}
    results = list(evaluate(lambda y, operator: torch.full((2, 1, 16, 16), 0.5), pictures, protocol(batch_size=2),
                            metrics=metrics))
    errors = [np.abs(original.luminance - 127.5).mean() for original in pictures]
    assert [result.scores["me"] for result in results] == pytest.approx(errors, rel=1e-5)
    assert [list(result.scores) for result in results] == [["psnr", "ssim", "me"]] * 2
    scores = mean_scores(results, metrics)
    assert scores.values["me"] == pytest.approx(np.mean(errors), rel=1e-5)
    assert scores.values["dark"] == min(original.luminance.min() for original in pictures)


def test_averages():
    def result(name, psnr, ssim, seconds):
        return Result(name, {"psnr": psnr, "ssim": ssim}, seconds, 0.1, None)
    results = [result("a", 30.0, 0.9, 1.0), result("b", 33.0, 0.7, 2.0), result("c", 36.0, 0.5, 6.0)]
    scores = mean_scores(results)
    assert (scores.psnr, scores.ssim, scores.seconds, scores.density, scores.count) == (
        33.0, pytest.approx(0.7), 3.0, pytest.approx(0.1), 3)
    assert math.isnan(mean_scores([*results, result("d", 1.0, math.nan, 1.0)]).ssim)
    with pytest.raises(ValueError, match="no results"):
        mean_scores([])


def test_noise_is_drawn_from_seed_and_name_and_told_to_networks_that_take_it():
    told = []

    def net(y, operator, noise_level):
        told.append(noise_level)
        return operator.A_adjoint(y)

    measurement = Measurement(settings={"cs_ratio": 1.0, "block_size": 4}, noise=(0.1, 0.1))
    grey = [Picture(name, np.full((64, 64), 128, np.uint8)) for name in "ab"]
    together = list(evaluate(net, grey, Protocol(measurement, batch_size=2)))
    assert [level.tolist() for level in told] == [[pytest.approx(0.1)] * 2]
    for picture_, result in zip(grey, together, strict=True):  # Φ is orthogonal: the noise stays white
        (alone,) = evaluate(back_projection, [picture_], Protocol(measurement))
        assert np.abs(alone.reconstruction - result.reconstruction).max() < 1e-3
        assert (result.reconstruction / 255 - 128 / 255).std() == pytest.approx(0.1, rel=0.05)
    assert np.abs(together[0].reconstruction - together[1].reconstruction).max() > 10
    with pytest.raises(TypeError, match="noise_level"):  # it must be told
        list(evaluate(net, grey, protocol()))
