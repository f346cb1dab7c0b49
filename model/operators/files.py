"""Numbers that a user gives in a .npy file: a matrix, a blur kernel."""
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


def read_matrix(path: Path, what: str) -> Tensor:
    """Return the real numbers, (rows, columns) float64, of a .npy file.

    Raises:
        ValueError: where there are none; the message calls the file `what` and says why.
    """
    try:
        with open(path, "rb") as file:  # np.load would try archives and pickles too
            found = np.lib.format.read_array(file, allow_pickle=False)
    except Exception as error:  # what a damaged header can raise is not written down anywhere
        raise ValueError(f"the {what} {path} is no array of numbers in a .npy file ({error})") from error
    if found.dtype.kind not in "biuf":
        raise ValueError(f"the {what} {path} is no array of real numbers, but of {found.dtype}")
    matrix = torch.from_numpy(found.astype(np.float64))
    if matrix.ndim != 2 or not matrix.float().isfinite().all() or not matrix.float().any():
        raise ValueError(f"the {what} {path} must hold finite numbers, not all 0, in 2 dimensions; its shape is "
                         f"{tuple(matrix.shape)}")
    return matrix
