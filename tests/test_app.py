"""The page, opened in a real browser: a sample, a dropped photograph, the sliders, what comes out, and broken files."""
import os
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import cv2
import numpy as np
import pytest
import skimage
import torch

from model import IDM
from tests.conftest import ROOT
from utils.data.images import read_picture
from utils.data.testsets import Picture, load_testset
from utils.evaluation.evaluate import evaluate
from utils.evaluation.protocol import Protocol
from utils.measurement import Measurement

PHOTOGRAPHS = Path(skimage.__file__).parent / "data"
PATIENCE = 300  # seconds, which stand for ever
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "small"
    IDM.compact(32, 3, shuffle=4).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def python() -> str:
    """The Python that has Gradio: that of `make app`, or this one."""
    own = ROOT / ".venv-app" / "bin" / "python"
    if not own.exists() and find_spec("gradio") is None:
        pytest.skip("Gradio, of requirements-app.txt, is not installed: make app")
    return str(own) if own.exists() else sys.executable


def test_what_every_operator_measures_is_shown(python):
    code = """if True:
        import app, torch
        from utils.data.testsets import load_testset
        picture, device = load_testset("Samples")[2], torch.device("cpu")
        for name in app.usable_operators():
            measurement = app.read_measurement(name, app.settings_text(name)[1]["value"], 0.1, 0.0)
            measured = app.measure([picture], measurement, measurement.shared(device), device)
            print(name, *app.small(app.picture_of(measured)).shape)"""
    shown = subprocess.run([python, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    sizes = {name: sides for name, *sides in map(str.split, shown.splitlines())}
    assert len(sizes) >= 8 and sizes["hadamard"] == ["512", "512", "3"]


@pytest.fixture(scope="module")
def address(weights, python, tmp_path_factory) -> str:
    """Of the page."""
    port = 20_000 + os.getpid() % 10_000
    log = open(tmp_path_factory.mktemp("log") / "app.txt", "w+")  # noqa: SIM115, it is closed with the process
    program = subprocess.Popen([python, "app.py", "--port", str(port), "--weights", str(weights), "--device", "cpu"],
                               cwd=ROOT, stdout=log, stderr=log)
    try:
        for _ in range(PATIENCE):
            time.sleep(1)
            try:
                urlopen(f"http://127.0.0.1:{port}", timeout=5).close()
                break
            except (URLError, OSError):
                assert program.poll() is None, Path(log.name).read_text()
        yield f"http://127.0.0.1:{port}"
        assert "Traceback" not in Path(log.name).read_text()
    finally:
        program.terminate()
        program.wait()
        log.close()


@pytest.fixture
def page(browser, address):
    browser.get(address)
    until(browser, lambda: len(browser.find_elements("css selector", "#samples img")) == 8)
    yield browser
    loaded = browser.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)")
    assert [name for name in loaded if not name.startswith((address, "data:", "blob:"))] == []
    assert [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []


def until(browser, condition):
    """What a condition returns once that is true."""
    from selenium.common.exceptions import StaleElementReferenceException
    from selenium.webdriver.support.ui import WebDriverWait
    return WebDriverWait(browser, PATIENCE, 0.5, [StaleElementReferenceException]).until(lambda _: condition())


def one(page, selector: str):
    return page.find_element("css selector", selector)


def drop(page, path: Path) -> None:
    until(page, lambda: page.find_elements("css selector", "#drop input[type=file]"))
    one(page, "#drop input[type=file]").send_keys(str(path))


def images(page, selector: str, count: int) -> list[np.ndarray]:
    """The pictures within an element, once there are so many: (H, W, 3) of RGB."""
    def decoded():
        found = page.find_elements("css selector", f"{selector} img")
        return found if len(found) == count and all(page.execute_script(
            "return arguments[0].complete && arguments[0].naturalWidth > 0", image) for image in found) else None
    pictures = []
    for image in until(page, decoded):
        flat, width, height = page.execute_script("""
            const image = arguments[0], canvas = document.createElement("canvas");
            canvas.width = image.naturalWidth;
            canvas.height = image.naturalHeight;
            canvas.getContext("2d").drawImage(image, 0, 0);
            const {data, width, height} = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
            return [[...data], width, height];""", image)
        pictures.append(np.array(flat, np.uint8).reshape(height, width, 4)[..., :3])
    return pictures


def scores(page) -> list[str]:
    return until(page, lambda: [cell.text for cell in page.find_elements("css selector", "#scores b")])


def set_slider(page, name: str, value: float) -> None:
    number = one(page, f"#{name} input[type=number]")
    page.execute_script("arguments[0].value = arguments[1]; arguments[0].dispatchEvent(new Event('input', {bubbles: "
                        "true})); arguments[0].dispatchEvent(new Event('change', {bubbles: true}))", number, value)


def expected(weights: Path, picture: Picture, ratio: float):
    result, = evaluate(IDM.from_checkpoint(weights), [picture], Protocol(Measurement("cs", {"cs_ratio": ratio,
                                                                                            "block_size": 32})))
    return result


def test_a_sample_is_reconstructed_step_by_step_and_scored_as_by_test_py(page, weights):
    page.find_elements("css selector", "#samples button")[2].click()  # the cameraman
    picture = load_testset("Samples")[2]
    assert np.array_equal(images(page, "#slider", 2)[0][..., 0], picture.luminance)
    set_slider(page, "ratio", 50)
    one(page, "#start").click()
    result = expected(weights, picture, 0.5)
    assert scores(page) == [f"{result.psnr:.2f} dB", f"{result.ssim:.4f}", "0.500"]
    truth, found = images(page, "#slider", 2)
    assert np.array_equal(truth[..., 0], picture.luminance)
    assert np.abs(found[..., 0] - result.reconstruction).max() < 0.51
    strip = images(page, "#strip", 6)  # y, A⁺y, three steps, the result
    captions = [caption.text for caption in page.find_elements("css selector", "#strip .caption-label")]
    assert [caption.split(",")[0] for caption in captions] == [
        "y", "A⁺y", "after step t = 3", "after step t = 2", "after step t = 1", "x̂"]
    small = cv2.resize(found, (512, 512), interpolation=cv2.INTER_NEAREST)
    assert np.array_equal(strip[5], small) and not np.array_equal(strip[2], small)
    handle = one(page, "#slider .inner, #slider [role=slider], #slider .handle-wrap, #slider .outer")
    before = handle.rect["x"]
    drag(page, handle, 120)
    assert abs(handle.rect["x"] - before - 120) < 5


def drag(page, element, pixels: int) -> None:
    from selenium.webdriver import ActionChains
    ActionChains(page).click_and_hold(element).move_by_offset(pixels, 0).release().perform()


def test_a_dropped_photograph_of_odd_size_in_colour(page, weights, tmp_path):
    path = tmp_path / "my_cat.png"
    cv2.imwrite(str(path), cv2.imread(str(PHOTOGRAPHS / "chelsea.png"))[90:170, 130:241])
    drop(page, path)
    picture = Picture(path.stem, *read_picture(path), path.name)
    assert images(page, "#slider", 2)[0].shape == (80, 111, 3)
    one(page, "#start").click()
    result = expected(weights, picture, 0.1)
    found = scores(page)
    assert found[:2] == [f"{result.psnr:.2f} dB", f"{result.ssim:.4f}"]
    assert found[2] == f"{96 * 128 / 1024 * 103 / 80 / 111:.3f}"  # ceil(102.4) numbers of each of 12 blocks


def test_what_is_wrong_is_said_on_the_page_and_the_page_goes_on(page, weights, tmp_path):
    one(page, "#start").click()
    alert = until(page, lambda: page.find_elements("css selector", "#status [role=alert]"))[0]
    assert alert.text == "choose a sample or drop a photograph first"
    broken = tmp_path / "broken & <b>.jpg"
    broken.write_bytes((PHOTOGRAPHS / "rocket.jpg").read_bytes()[:9000])
    drop(page, broken)
    alert = until(page, lambda: [text for text in page.find_elements("css selector", "#status [role=alert]")
                                 if "broken" in text.text])[0]
    assert alert.text.startswith("cannot read broken") and str(tmp_path) not in alert.text and "/tmp" not in alert.text
    page.find_elements("css selector", "#samples button")[0].click()
    images(page, "#slider", 2)
    assert until(page, lambda: not page.find_elements("css selector", "#status [role=alert]"))
