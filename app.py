"""A page in a browser: choose a photograph, see what is measured of it, and watch the network recover it.

    make app                                     # installs what it needs and opens http://127.0.0.1:7860
    python app.py --host 0.0.0.0 --port 8080     # for others to use as well

Nothing is loaded from elsewhere, and nothing is sent anywhere.
"""
import argparse
import html
import os
import queue
import sys
import threading
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # which Gradio reads when it is imported
import gradio as gr  # noqa: E402

from model import IDM, WeightsError  # noqa: E402
from model.operators import OPERATORS  # noqa: E402
from utils.data.images import in_colour, read_picture  # noqa: E402
from utils.data.testsets import Picture, load_testset  # noqa: E402
from utils.devices import open_device  # noqa: E402
from utils.errors import UserError, printable, run  # noqa: E402
from utils.evaluation.evaluate import Measured, Result, in_255, measure, score  # noqa: E402
from utils.evaluation.photograph import Window, fitting_window, recover, window_note  # noqa: E402
from utils.flags import Parser, file_path, integer  # noqa: E402
from utils.measurement import Measurement  # noqa: E402
from utils.measurement_flags import measurements  # noqa: E402
from utils.operator_settings import setting_parameters  # noqa: E402
from utils.weights import BESIDE, WeightFlags, load_network  # noqa: E402

LARGEST = 6_000_000  # pixels: minutes for all who wait
STRIP = 512  # pixels, the longer side of pictures in the strip
AUTOMATIC = "automatic"
CSS = """
.gradio-container {max-width: 1180px !important; margin: auto !important}
#title h1 {font-size: 26px; margin: 0 0 4px}
#title p {opacity: .75}
#samples .grid-wrap {overflow: hidden}
#samples .grid-container {gap: 6px; grid-template-columns: repeat(4, minmax(0, 1fr))}
#samples .thumbnail-lg {min-width: 0}
#drop {min-height: 116px}
#drop .wrap {font-size: 14px; line-height: 1.3}
#scores .numbers {display: flex; justify-content: space-around; text-align: center}
#scores b {display: block; font-size: 26px; font-variant-numeric: tabular-nums}
#scores span {font-size: 13px; opacity: .65}
#scores {min-height: 58px}
#status {min-height: 34px}
#status .bar {height: 6px; border-radius: 3px; background: var(--border-color-primary); margin-top: 4px}
#status .bar div {height: 100%; border-radius: 3px; background: var(--color-accent); transition: width .3s}
#status .error {color: #dc2626; font-weight: 600}
footer {display: none !important}
"""


class Stopped(Exception):
    """Nobody waits for this reconstruction any more."""


class Page:
    """What the page's controls do; one reconstruction at a time, the others wait."""

    def __init__(self, device: torch.device, weights: Path | None):
        self.device, self.weights = device, weights
        self.samples = load_testset("Samples")
        self.network = lru_cache(maxsize=2)(self._load)

    def _load(self, path: Path) -> tuple[IDM, Window]:
        """Return a network and the attention window that it was trained with."""
        net = load_network(path, self.device)
        return net, net.attention_window

    def open(self, file: str | None) -> tuple[str | None, Any, str]:
        """Show the photograph that somebody dropped, or say what is wrong with it."""
        if file is None:
            return None, None, ""
        try:
            picture = read(file)
        except UserError as error:
            return None, None, refusal(error, file)
        return file, (shown(picture), shown(picture)), ""

    def choose(self, event: gr.SelectData) -> tuple[int, Any, str]:
        """Show a sample."""
        picture = self.samples[event.index]
        return event.index, (shown(picture), shown(picture)), ""

    def reconstruct(self, chosen: int | str | None, ratio: float, operator: str, pairs: str, noise: float,
                    weights: str) -> Iterator[tuple[Any, Any, str, str]]:
        """Yield slider, strip, scores and status, as there is more of them to show."""
        if chosen is None:
            yield gr.skip(), [], "", refusal(UserError("choose a sample or drop a photograph first"))
            return
        try:
            picture = self.samples[chosen] if isinstance(chosen, int) else read(chosen)
            measurement = read_measurement(operator, pairs, ratio / 100, noise)
            path = WeightFlags(self.weights).find(measurement) if weights == AUTOMATIC else Path(weights)
            work = Work(self, picture, measurement, path)
        except (UserError, WeightsError) as error:
            yield gr.skip(), [], "", refusal(error, chosen)
            return
        try:
            yield (shown(picture), shown(picture)), [], "", progress(0.0, "measuring")
            for strip, share in work.watched():
                yield gr.skip(), strip, "", progress(share, f"reconstructing {picture.name}")
            slider = (shown(picture), shown(picture, work.result.reconstruction))
            yield slider, work.strip, numbers(work.result), progress(1.0, work.said)
        except (UserError, WeightsError) as error:
            yield gr.skip(), gr.skip(), "", refusal(error, chosen)
        finally:
            work.stopped.set()


class Work:
    """A reconstruction in a thread of its own, and what it has come to."""

    def __init__(self, page: Page, picture: Picture, measurement: Measurement, path: Path):
        self.page, self.picture, self.measurement, self.path = page, picture, measurement, path
        self.strip: list[tuple[np.ndarray, str]] = []  # pictures and what they are
        self.share, self.said, self.failure = 0.0, "", None
        self.result: Result | None = None
        self.events: queue.Queue[bool] = queue.Queue()
        self.stopped = threading.Event()

    def watched(self) -> Iterator[tuple[Any, float]]:
        """Work; yield the strip, where it has grown, and the share that is done."""
        threading.Thread(target=self._run, daemon=True).start()
        working = True
        while working:
            try:
                working = self.events.get(timeout=0.3)
                yield list(self.strip), self.share
            except queue.Empty:
                yield gr.skip(), self.share
        if self.failure is not None:
            raise self.failure

    def _run(self) -> None:
        try:
            self._reconstruct()
        except Exception as error:
            self.failure = error
        self.events.put(False)

    def _reconstruct(self) -> None:
        net, trained = self.page.network(self.path)
        net.attention_window = fitting_window(trained, self.picture.luminance.size)
        shared = self.measurement.shared(self.page.device)
        measured = measure([self.picture], self.measurement, shared, self.page.device)
        self._add(picture_of(measured), "y, what is measured")
        self._add(self._shown(measured.operator.A_dagger(measured.y)), "A⁺y, its back-projection")
        x_hat, seconds = recover(net, measured, progress=self._advance,
                                 estimate=lambda step, x: self._add(self._shown(x), f"after step t = {step}"))
        self.result = score(self.picture, x_hat[0], seconds, measured.numbers)
        self._add(self._shown(x_hat), "x̂, the reconstruction")
        self.said = f"{seconds:.1f} s with {os.path.relpath(self.path)}{', '.join(['', *self._notes(net)])}"

    def _notes(self, net: IDM) -> list[str]:
        notes = WeightFlags(step_number=net.config.num_steps).notes(self.path, net, self.measurement)
        return notes + window_note(net)

    def _shown(self, x: torch.Tensor) -> np.ndarray:
        return shown(self.picture, in_255(x[0], self.picture.luminance.shape))

    def _add(self, picture: np.ndarray, caption: str) -> None:
        self.strip.append((small(picture), caption))
        self.events.put(True)

    def _advance(self, share: float) -> None:
        if self.stopped.is_set():
            raise Stopped
        self.share = share


def read(file: str) -> Picture:
    picture = Picture(Path(file).stem, *read_picture(file), Path(file).name)
    if picture.luminance.size > LARGEST:
        height, width = picture.luminance.shape
        raise UserError(f"{file} has {width}x{height} pixels, more than this page takes; crop it, or use "
                        "reconstruct.py")
    return picture


def read_measurement(operator: str, pairs: str, cs_ratio: float, noise: float) -> Measurement:
    """Return what is to be measured; files of this machine are no settings here, since anybody may use the page."""
    known = setting_parameters(operator)
    for pair in pairs.split():
        if known.get(name := pair.partition("=")[0]) and known[name].annotation is Path:
            raise UserError(f"{name} names a file, which this page does not take; use reconstruct.py")
    ratio = [cs_ratio] if "cs_ratio" in known else None
    measurement, = measurements(operator, pairs.split(), ratio, None, (noise, noise), 2025)
    return measurement


def usable_operators() -> list[str]:
    """Return the operators that need no file."""
    return [name for name in OPERATORS if not any(
        parameter.annotation is Path and parameter.default is parameter.empty
        for parameter in setting_parameters(name).values())]


def settings_text(operator: str) -> tuple[Any, Any]:
    """Return the ratio's slider, shown where the operator has a ratio, and the text of its other settings."""
    known = setting_parameters(operator)
    pairs = [f"{name}={parameter.default}" for name, parameter in known.items()
             if name not in ("cs_ratio", "block_size") and parameter.default not in (None, parameter.empty)]
    return gr.update(visible="cs_ratio" in known), gr.update(value=" ".join(pairs), visible=bool(pairs))


def found_weights() -> list[str]:
    """Return the weights below the folder weight, as paths from here."""
    found = [path.parent for path in BESIDE.glob("*/config.json")] + [path.parent for path in
                                                                       BESIDE.glob("*/pretrained/config.json")]
    return [os.path.relpath(path) for path in sorted([*found, *BESIDE.glob("*/net_params_*.pkl")])]


def shown(picture: Picture, luminance: np.ndarray | None = None) -> np.ndarray:
    """Return a picture, or another luminance in its colours, as RGB."""
    pixels = in_colour(picture.luminance if luminance is None else luminance, picture.ycrcb)
    return cv2.cvtColor(pixels, cv2.COLOR_GRAY2RGB if pixels.ndim == 2 else cv2.COLOR_BGR2RGB)


def picture_of(measured: Measured) -> np.ndarray:
    """Return the numbers y as a grey picture: the middle 98 % of them from black to white."""
    y = measured.y[0].detach().cpu()
    y = y.abs().log1p() if y.is_complex() else y.float()
    y = y.reshape(-1, y.shape[-1])
    if len(y) == 1:  # a line of numbers is shown as a square
        side = int(y.numel()**0.5)
        y = y[0, :side**2].reshape(side, side)
    low, high = np.percentile(y.numpy(), (1, 99))
    grey = ((y.numpy() - low) / max(high - low, 1e-6)).clip(0, 1) * 255
    return cv2.cvtColor(grey.astype(np.uint8), cv2.COLOR_GRAY2RGB)


def small(pixels: np.ndarray) -> np.ndarray:
    """Return a picture no larger than the strip shows it."""
    scale = STRIP / max(pixels.shape[:2])
    interpolation = cv2.INTER_AREA if scale < 1 else cv2.INTER_NEAREST
    height, width = (max(1, round(scale * side)) for side in pixels.shape[:2])
    return cv2.resize(pixels, (width, height), interpolation=interpolation)


def numbers(result: Result) -> str:
    cells = {"PSNR": f"{result.psnr:.2f} dB", "SSIM": f"{result.ssim:.4f}",
             "numbers measured a pixel": f"{result.density:.3f}"}
    parts = "".join(f"<div><b>{value}</b><span>{name}</span></div>" for name, value in cells.items())
    return f"<div class='numbers'>{parts}</div>"


def progress(share: float, text: str) -> str:
    return f"{html.escape(printable(text))}<div class='bar'><div style='width: {100 * share:.1f}%'></div></div>"


def refusal(error: Exception, chosen: int | str | None = None) -> str:
    """Return the sentence; of an uploaded file its own name, without the folder it was put into."""
    text = str(error).replace(str(chosen), Path(chosen).name) if isinstance(chosen, str) else str(error)
    return f"<div class='error' role='alert'>{html.escape(printable(text))}</div>"


def build(page: Page) -> gr.Blocks:
    """Lay the page out."""
    with gr.Blocks(title="IDM: see what a camera misses", analytics_enabled=False,
                   delete_cache=(3600, 3600)) as blocks:
        gr.Markdown("# Invertible Diffusion Models\nA camera measures y = A x, far fewer numbers than a photograph has "
                    "pixels. The network recovers the photograph in a few sampling steps. Of a colour photograph the "
                    "luminance is measured; the colours are its own.", elem_id="title")
        chosen = gr.State(None)
        with gr.Row():
            with gr.Column(scale=4, min_width=320):
                samples = gr.Gallery([shown(picture) for picture in page.samples], show_label=False, columns=4,
                                     height=216, object_fit="cover", allow_preview=False, interactive=False,
                                     elem_id="samples", buttons=[])
                file = gr.File(show_label=False, height=116, elem_id="drop")
                ratio = gr.Slider(1, 100, 10, step=1, label="Ratio, in %: numbers measured / pixels", elem_id="ratio")
                with gr.Row():
                    operator = gr.Dropdown(usable_operators(), value="cs", label="Operator", elem_id="operator")
                    weights = gr.Dropdown([AUTOMATIC, *found_weights()], value=AUTOMATIC, label="Weights",
                                          elem_id="weights", visible=page.weights is None)
                pairs = gr.Textbox("", label="Settings of the operator", visible=False, elem_id="settings")
                noise = gr.Slider(0, 0.1, 0, step=0.005, label="Noise, its standard deviation",
                                  elem_id="noise")
                with gr.Row():
                    start = gr.Button("Reconstruct", variant="primary", elem_id="start")
                    stop = gr.Button("Stop", elem_id="stop")
            with gr.Column(scale=6, min_width=400):
                status = gr.HTML("", elem_id="status")
                slider = gr.ImageSlider(label="Photograph | reconstruction", height=430, max_height=430, format="png",
                                        interactive=False, elem_id="slider", buttons=["download", "fullscreen"])
                scores = gr.HTML("", elem_id="scores")
        strip = gr.Gallery(label="From measurements to photograph", columns=6, height=240, object_fit="contain",
                           format="png", interactive=False, elem_id="strip", buttons=["fullscreen"])

        samples.select(page.choose, None, [chosen, slider, status], show_progress="hidden", queue=False)
        file.change(page.open, file, [chosen, slider, status], show_progress="hidden", queue=False)
        operator.change(settings_text, operator, [ratio, pairs], show_progress="hidden", queue=False)
        going = start.click(page.reconstruct, [chosen, ratio, operator, pairs, noise, weights],
                            [slider, strip, scores, status], show_progress="hidden")
        stop.click(lambda: "stopped", None, status, cancels=going, queue=False)
    return blocks.queue(default_concurrency_limit=1, max_size=64)


def main() -> None:
    args = parse_arguments()
    page = Page(open_device(args.device), args.weights)
    theme = gr.themes.Base(primary_hue="indigo", neutral_hue="slate", font=["system-ui", "sans-serif"],
                           font_mono=["ui-monospace", "monospace"])
    build(page).launch(server_name=args.host, server_port=args.port, inbrowser=args.open, share=False, theme=theme,
                       css=CSS, ssr_mode=False, max_file_size="64mb", footer_links=[], quiet=not sys.stdout.isatty())


def parse_arguments() -> argparse.Namespace:
    parser = Parser(__doc__.split("\n")[0])
    add = parser.add_argument
    add("--host", default=os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1"),
        help="the address to listen on; 0.0.0.0 for other machines as well")
    add("--port", type=integer(1, 65535), default=int(os.environ.get("GRADIO_SERVER_PORT", "7860")),
        help="and its port")
    add("--open", action="store_true", help="open the page in a browser")
    add("--weights", type=file_path,
        help="a published .pkl or a folder of train.py; if not given, there is a choice on the page")
    add("--device", help="cpu, cuda, cuda:1, ...; the first GPU, where there is one, if not given")
    return parser.parse_args()


if __name__ == "__main__":
    run(main, WeightsError)
