"""What train.py draws for a batch, makes of it and of its gradients: recorded numbers, and the formulas in NumPy."""
import math

import numpy as np
import pytest
import torch

import train
from model.operators import OPERATORS, LinearOperator, random_sampling_matrix
from utils.distributed import Process
from utils.training.draws import Draw, Draws, matrix_seed
from utils.training.flags import training_ratios
from utils.training.learning_rate import learning_rate
from utils.training.loop import give_up_if_nothing_is_finite
from utils.training.run import Run
from utils.training.settings import TEST_SEED, Settings
from utils.training.state import Progress

SIDE = 8  # of crops
CPU = torch.device("cpu")
# Seed, iteration, slot; at ratios 0.05-0.6 and 0.1/0.3/0.5, blocks of 16x16 and crops of 32x32: columns of Φ at either,
# symmetry, the permutation's beginning and its sum weighted by 0, 1, ...; the beginning of Φ. Of commit 5bc96cd.
RECORDED = [
    ((2025, 0, 0), (35, 26), 5, [441, 460, 395], 272396015, [0.041097, -0.012293, -0.004508]),
    ((2025, 0, 1), (137, 26), 0, [831, 211, 990], 269005066, [-0.023561, 0.101292, -0.062097]),
    ((2025, 700, 3), (85, 26), 4, [238, 491, 497], 263930886, [-0.051114, -0.109174, 0.095542]),
    ((2031, 0, 0), (52, 77), 3, [289, 160, 682], 270378704, [-0.028693, -0.013867, -0.053842]),
    ((2031, 0, 1), (19, 128), 6, [990, 606, 303], 270785824, [0.013844, 0.044085, 0.081161]),
    ((2031, 700, 3), (24, 26), 7, [406, 643, 216], 270369275, [0.033195, -0.002045, -0.010617]),
]


class Toy(LinearOperator):
    """y = scale · x."""

    def __init__(self, scale: float):
        super().__init__()
        self.scale = scale

    @classmethod
    def random(cls, image_shape: tuple[int, int], generator: torch.Generator, scale: float = 2.0) -> "Toy":
        return cls(scale)

    def A(self, x):
        return self.scale * x

    A_adjoint = A


class Constant(torch.nn.Module):
    """A network of one number, with which it answers."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(0.3))

    def forward(self, y, operator, noise_level=None, steps=None):
        self.told = y, operator, noise_level, steps
        return self.weight.expand(len(y), 1, SIDE, SIDE)


def make_run(iteration: int = 0, **more) -> Run:
    settings = Settings(**{"block_size": 4, "patch_size": SIDE, "batch_size": 2, "learning_rate": 1e-3,
                           "precision": "fp32", "iters_per_epoch": 1, **more}).completed()
    net, average = Constant(), Constant().requires_grad_(False) if settings.ema else None
    return Run(settings, Process(0, 1, CPU), None, net, average, torch.optim.Adam(net.parameters(), fused=True),
               torch.amp.GradScaler("cpu", enabled=settings.precision == "fp16"), Progress(iteration=iteration))


def crops(count: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(count).integers(0, 256, (count, 1, SIDE, SIDE), dtype=np.uint8))


@pytest.mark.parametrize(("place", "columns", "symmetry", "begins", "weighted", "matrix"), RECORDED)
def test_draws_are_those_that_were_recorded(place, columns, symmetry, begins, weighted, matrix):
    seed, iteration, slot = place
    for text, expected in zip(("0.05-0.6", "0.1/0.3/0.5"), columns, strict=True):
        settings = Settings(cs_ratio=training_ratios(text), block_size=16, patch_size=32, seed=seed)
        draw = Draws(settings, range(slot, slot + 1), CPU).draw(iteration, slot)
        permutation = draw.operator.permutation
        assert (draw.operator.sampling_matrix.shape, draw.symmetry) == ((256, expected), symmetry)
        assert permutation[:3].tolist() == begins and int((permutation * torch.arange(1024)).sum()) == weighted
        assert draw.operator.sampling_matrix[0, :3].tolist() == pytest.approx(matrix, abs=2e-6)
    drawn_alone = random_sampling_matrix(1.0, 16, torch.Generator().manual_seed(seed + slot))
    assert torch.equal(draw.operator.sampling_matrix, drawn_alone[:, :expected])


def test_only_the_published_seed_trains_with_the_matrix_of_the_tests():
    for seed in range(2015, 2035):
        seeds = [matrix_seed(seed, slot) for slot in range(16)]
        assert len(set(seeds)) == 16 and (TEST_SEED in seeds) == (seed == 2025)
        assert seeds == [seed + slot for slot in range(16)] or seed < 2025 < seed + 16


def test_crops_come_in_all_eight_orientations():
    crop = crops(1)
    turned = {Draw(symmetry, None).turned(crop).numpy().tobytes() for symmetry in range(8)}
    x = crop.numpy()[0, 0] / np.float32(255)
    assert turned == {np.rot90(y, k).tobytes() for y in (x, x.T) for k in range(4)}


def test_what_is_drawn_for_each_batch_is_uniform_and_its_own():
    draws = Draws(make_run(cs_ratio=training_ratios("0.25-0.75")).settings, range(2), CPU)
    drawn = [draws.draw(iteration, slot) for iteration in range(200) for slot in range(2)]
    columns, symmetries = ([counted.count(value) for value in sorted(set(counted))] for counted in (
        [draw.operator.sampling_matrix.shape[1] for draw in drawn], [draw.symmetry for draw in drawn]))
    assert len(columns) == len(symmetries) == 8  # M = 5, ..., 12, each expected 50 times, give or take 7
    assert min(columns + symmetries) > 25 and max(columns + symmetries) < 80
    permutations = {tuple(draw.operator.permutation.tolist()) for draw in drawn}
    assert len(permutations) == 400 and all(sorted(each) == list(range(SIDE**2)) for each in permutations)
    assert all(draw.operator.permutation.ndim == 1 for draw in drawn)  # one serves the whole batch


@pytest.mark.parametrize("loss", ["l1", "log_mse"])
def test_a_step_moves_the_weights_against_the_gradient_of_the_loss_of_all_batches(loss):
    run, batches = make_run(loss=loss, accumulate=2), [crops(2), crops(3)[:2]]
    run.optimizer = torch.optim.SGD(run.net.parameters(), fused=True)
    x = torch.cat(batches).double().numpy() / 255
    error = np.float64(np.float32(0.3)) - x
    squares = (error**2).mean((1, 2, 3))
    expected, slope = (np.abs(error).mean(), np.sign(error).mean()) if loss == "l1" else (
        np.log(squares).mean(), (2 * error.mean((1, 2, 3)) / squares).mean())
    found, norm = train.train_step(run, iter(batches))
    assert float(found) == pytest.approx(expected, rel=1e-5) and float(norm) == pytest.approx(abs(slope), rel=1e-4)
    assert float(run.net.weight.detach()) == pytest.approx(0.3 - 1e-3 * slope, rel=1e-6)
    assert (run.progress.iteration, run.progress.crops) == (1, 4)


def test_noise_is_added_to_the_measurements_and_told_to_the_network():
    run, x = make_run(noise=(0.02, 0.06), cs_ratio=training_ratios("1"), batch_size=500), crops(500)
    train.train_step(run, iter([x]))
    y, operator, levels, steps = run.net.told
    draw = run._draws.draw(0, 0)
    noise = (y - operator.A(draw.turned(x))).flatten(1)
    assert levels.shape == (500,) and steps is None and 0.02 <= levels.min() < 0.021 and 0.059 < levels.max() <= 0.06
    scaled = noise / levels[:, None]  # 32,000 standard normal numbers
    assert abs(float(scaled.mean())) < 0.03 and float(scaled.std()) == pytest.approx(1, abs=0.02)
    assert float((noise.std(1) / levels).mean()) == pytest.approx(1, abs=0.02)  # each crop has its own level
    again, _ = run._draws.draw(0, 0).measure(draw.turned(x))
    assert torch.equal(y, again)
    quiet = make_run()
    train.train_step(quiet, iter([crops(2)]))
    assert quiet.net.told[2:] == (None, None)


def test_the_number_of_steps_and_the_operator_are_drawn_for_each_batch(monkeypatch):
    monkeypatch.setitem(OPERATORS, "toy", Toy)
    settings = make_run(random_steps=True, operator=("cs", "toy"), operator_settings=("toy.scale=3",)).settings
    drawn = [Draws(settings, range(1), CPU).draw(iteration, 0) for iteration in range(300)]
    counts = [[draw.steps for draw in drawn].count(steps) for steps in (1, 2, 3)]
    assert sum(counts) == 300 and min(counts) > 70 and max(counts) < 130  # 100 each, give or take 8
    toys = [draw.operator.scale for draw in drawn if isinstance(draw.operator, Toy)]
    assert set(toys) == {3.0} and 110 < len(toys) < 190
    assert settings.name == "R_0.10_T_3_B_4+toy_scale_3_T_3"


def update(run: Run, gradient: float) -> float:
    """How far a gradient moves the weight."""
    before = run.net.weight.item()
    run.net.weight.grad = torch.tensor(gradient)
    train.update(run, torch.tensor(0.5))
    return run.net.weight.item() - before


@pytest.mark.parametrize(("epoch", "rate"), [(0, 1e-3), (9, 1e-3), (10, 5e-4), (45, 6.25e-5)])
def test_an_update_moves_the_weights_by_the_published_learning_rate(epoch, rate):
    """Adam's first step is the learning rate, whatever the gradient."""
    assert update(make_run(epoch), -7.0) == pytest.approx(rate, rel=1e-3)


def test_learning_rates_are_the_closed_forms():
    step = Settings().completed()
    assert [learning_rate(step, epoch * 1000) for epoch in range(50)] == [1e-4 * 0.5**(i // 10) for i in range(50)]
    assert learning_rate(step, 0) == learning_rate(step, 9_999) == 1e-4
    warm = Settings(warm_up=100).completed()
    assert learning_rate(warm, 49) == pytest.approx(5e-5) and learning_rate(warm, 100) == 1e-4
    assert {learning_rate(Settings(lr_schedule="constant").completed(), i) for i in (0, 30_000, 49_999)} == {1e-4}
    cosine = Settings(lr_schedule="cosine").completed()
    assert cosine.warm_up == 1000  # of 50,000 iterations
    rates = [learning_rate(cosine, i) for i in (0, 999, 25_500)]
    assert rates == [pytest.approx(value) for value in (1e-7, 1e-4, 5e-5)]
    assert 0 < learning_rate(cosine, 49_999) < 1e-9
    linear = Settings(lr_schedule="linear", warm_up=10_000).completed()
    rates = [learning_rate(linear, i) for i in (0, 10_000, 30_000, 49_999)]
    assert rates == [pytest.approx(value) for value in (1e-8, 1e-4, 5e-5, 2.5e-9)]


def test_clipping_scales_all_gradients_to_the_norm():
    run = make_run(clip=0.5)
    run.optimizer = torch.optim.SGD(run.net.parameters(), fused=True)
    assert update(run, -7.0) == pytest.approx(0.5e-3, rel=1e-3)


def test_the_running_average_is_that_of_its_definition():
    run, average = make_run(ema=0.5), 0.3
    for iteration in range(12):
        update(run, 1.0)
        decay = min(0.5, (1 + iteration) / (10 + iteration))
        average = decay * average + (1 - decay) * run.net.weight.item()
        assert float(run.ema.weight) == pytest.approx(average, rel=1e-6) and not run.ema.weight.requires_grad


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_gradients_that_are_not_finite_move_nothing_are_counted_and_end_the_run(precision):
    run = make_run(precision=precision)
    run.scaler.scale(torch.ones(()))  # it is made by the first loss

    def counted() -> list[float]:
        run.read_totals()
        return [run.progress.loss_sum, run.progress.loss_count, run.progress.skipped, run.progress.skipped_in_a_row]

    def moves(gradient: float) -> bool:
        moved = update(run, gradient) != 0
        give_up_if_nothing_is_finite(run)
        return moved

    assert not any(moves(math.inf) for _ in range(9)) and counted() == [0, 0, 9, 9]
    assert run.scaler.get_scale() == (128 if precision == "fp16" else 1)  # from 65536, which may take a few halvings
    assert moves(1.0) and counted() == [0.5, 1, 9, 0]
    assert not any(moves(math.nan) for _ in range(9))
    with pytest.raises(SystemExit, match="no finite loss or gradient in 10 iterations in a row, up to iteration 20"):
        moves(math.inf)
    assert counted() == [0.5, 1, 19, 10]


def test_a_loss_that_is_not_finite_leaves_its_mark_in_the_gradients():
    """Of a network whose gradient does not show it, as that of |x̂ − x| need not."""
    run = make_run()
    with torch.no_grad():
        run.net.weight.fill_(math.inf)
    loss, norm = train.train_step(run, iter([crops(2)]))
    assert loss == math.inf and norm.isnan() and run.skipped_in_a_row == 1
