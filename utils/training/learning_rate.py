"""The learning rate over a run: the published steps, a cosine, or constant, after a rise from 0 where one is wanted."""
import argparse
import math

HALVE_AFTER = (10, 20, 30, 40)  # epochs


def learning_rate(args: argparse.Namespace, iteration: int) -> float:
    """Of an iteration, counted from 0, under the flags of train.py."""
    if iteration < args.warm_up:
        return args.learning_rate * (iteration + 1) / args.warm_up
    if args.lr_schedule == "constant":
        return args.learning_rate
    if args.lr_schedule == "step":
        return args.learning_rate * 0.5 ** sum(iteration // args.iters_per_epoch >= epoch for epoch in HALVE_AFTER)
    total = args.epoch * args.iters_per_epoch
    return args.learning_rate * 0.5 * (1 + math.cos(math.pi * (iteration - args.warm_up) / (total - args.warm_up)))
