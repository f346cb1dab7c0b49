"""The table of operators.py as Markdown, and the strip of pictures."""
from pathlib import Path

import cv2
import numpy as np
import torch

from benchmarks.machine import save_table, table_row
from utils.files import write_atomic

COLUMNS = ("A⁺y", "classical", "compact, not told σ", "compact", "fine-tuned")
PICTURE, DETAIL, CAPTION = "camera", 128, 20  # of the Samples; side of what is shown of it, in pixels


def show(results: dict, tasks: dict[str, tuple[str, str]], report: Path) -> None:
    """Print the table, and put it between the marks in the report; `tasks`: test set and classical answer by title."""
    rows = [("", "pictures", "A⁺y", "a classical answer", "compact, σ not told", "compact", "fine-tuned"), ("---",) * 7]
    for title, row in results["scores"].items():
        testset, classical = tasks[title]
        cells = [f"{row[name]['psnr']:.2f} / {row[name]['ssim']:.4f}" if name in row else "" for name in COLUMNS]
        cells[1] = f"{cells[1]} ({classical})"
        rows.append((title, testset, *cells))
    save_table(report, "\n".join(map(table_row, rows)), "Other measurements")


@torch.inference_mode()
def draw(path: Path) -> None:
    """A row for each task: what A⁺ gives back, the classical answer, the network's, and the photograph."""
    from benchmarks.operators import TASKS, answers
    from utils.data.testsets import load_testset
    from utils.evaluation.evaluate import evaluate
    from utils.evaluation.protocol import Protocol

    (picture,) = (each for each in load_testset("Samples") if each.name == PICTURE)
    rows = []
    for task in [task for task in TASKS if task.testset != "Shepp-Logan"]:
        tiles = [_tile(picture.luminance, task.title)]
        for name, answer in answers(task, Path(__file__).resolve().parent.parent / "weight"):
            if name not in ("A⁺y", "classical", "fine-tuned"):
                continue
            (result,) = evaluate(answer, [picture], Protocol(task.measurement))
            caption = {"A⁺y": "back-projection", "classical": task.classical_name, "fine-tuned": "IDM"}[name]
            tiles.append(_tile(result.reconstruction, f"{caption}: {result.psnr:.2f} dB"))
        rows.append(np.concatenate(tiles, axis=1))
    _, png = cv2.imencode(".png", np.concatenate(rows))
    write_atomic(path, png.tobytes())


def _tile(luminance: np.ndarray, text: str) -> np.ndarray:
    """The middle of a picture, twice as large, with a caption below."""
    top, left = ((side - DETAIL) // 2 for side in luminance.shape)
    detail = np.clip(luminance[top:top + DETAIL, left:left + DETAIL].round(), 0, 255).astype(np.uint8)
    strip = np.full((CAPTION, 2 * DETAIL), 255, np.uint8)
    plain = text.replace("×", "x")  # which the font has not
    cv2.putText(strip, plain, (3, 14), cv2.FONT_HERSHEY_SIMPLEX, 0.38, 0, 1, cv2.LINE_AA)
    return np.concatenate((detail.repeat(2, 0).repeat(2, 1), strip))
