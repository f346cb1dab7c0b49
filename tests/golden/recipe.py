"""Deterministic weights for the golden cases: the same numbers on every machine and every library version.

`fill(name, shape, seed)` returns the float32 value of the parameter called `name` (its name in the published checkpoint
format, as model/checkpoint.py lists them).  Each tensor has a generator of its own, seeded by the CRC-32 of its name,
so the order in which parameters are visited does not matter.
"""
import zlib

import numpy as np


def fill(name: str, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Value of parameter `name`: float32 array of `shape`."""
    rng = np.random.RandomState((zlib.crc32(name.encode()) + seed) % 2**32)
    z = rng.standard_normal(shape)
    leaf = name.rsplit(".", 1)[-1]
    if leaf == "v":
        value = 0.5 + 0.05 * z
    elif leaf == "alpha":
        value = 0.5 + 0.1 * np.clip(z, -2, 2)
    elif leaf == "input_help_scale_factor":
        value = 1.0 + 0.1 * z
    elif leaf in ("merge_scale_factor", "merge_scale_factors"):
        value = 0.2 * z
    elif leaf == "bias":
        value = 0.05 * z
    elif "norm" in name:
        value = 1.0 + 0.1 * z
    else:
        value = z / np.sqrt(np.prod(shape[1:]))
    return value.astype(np.float32)


def probe(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Fixed unit-variance direction in which the gradient of `name` is recorded: float64 array of `shape`."""
    return np.random.RandomState(zlib.crc32(("probe:" + name).encode())).standard_normal(shape)
