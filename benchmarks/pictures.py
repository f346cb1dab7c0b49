"""Matplotlib without a window, and its figures written whole or not at all."""
import io
from pathlib import Path

import matplotlib

from utils.files import write_atomic

matplotlib.use("agg")
from matplotlib import pyplot as plt  # noqa: E402


def save(figure: plt.Figure, path: Path, dpi: int = 110) -> None:
    """Write a figure as PNG, and close it."""
    figure.savefig(image := io.BytesIO(), dpi=dpi)
    plt.close(figure)
    write_atomic(path, image.getvalue())
