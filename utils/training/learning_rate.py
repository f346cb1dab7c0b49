"""The learning rate over a run, after a rise from 0 where one is wanted."""
import math

from utils.training.settings import Settings

HALVE_AFTER = (10, 20, 30, 40)  # epochs


def learning_rate(settings: Settings, iteration: int) -> float:
    """Return that of an iteration, counted from 0."""
    rate, warm_up = settings.learning_rate, settings.warm_up
    if iteration < warm_up:
        return rate * (iteration + 1) / warm_up
    if settings.lr_schedule == "constant":
        return rate
    if settings.lr_schedule == "step":
        return rate * 0.5 ** sum(iteration // settings.iters_per_epoch >= epoch for epoch in HALVE_AFTER)
    done = (iteration - warm_up) / (settings.iterations - warm_up)
    return rate * (1 - done if settings.lr_schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done)))
