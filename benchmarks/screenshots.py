"""README's screenshots, by headless Chromium: the page of `make app`, and a report of compare.py.

    python benchmarks/redraw.py app.png report.png
"""
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.errors import UserError
from utils.files import write_atomic

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

ROOT = Path(__file__).resolve().parent.parent
PATIENCE = 300  # seconds
SIZE = (1180, 1240)  # of the window


def app(path: Path) -> None:
    """The page after a sample was reconstructed with the weights that ship."""
    python = ROOT / ".venv-app" / "bin" / "python"
    if not python.exists():
        raise UserError("the page needs Gradio: make app")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen([python, "app.py", "--port", str(port), "--device", "cpu"], cwd=ROOT,
                              stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        with chromium() as page:
            until(lambda: socket.create_connection(("127.0.0.1", port), 1).close() or True)
            page.get(f"http://127.0.0.1:{port}")
            samples = until(lambda: page.find_elements("css selector", "#samples button"))
            samples[3].click()
            until(lambda: len(page.find_elements("css selector", "#slider img")) == 2)
            page.find_element("css selector", "#start").click()
            until(lambda: page.find_elements("css selector", "#scores b"))
            time.sleep(2)  # pictures fade in
            write_atomic(path, page.get_screenshot_as_png())
    finally:
        server.terminate()
        server.wait()


def report(path: Path) -> None:
    """The report of two methods on the Samples: the weights that ship, and DDNM with the small DDPM."""
    with tempfile.TemporaryDirectory() as place, chromium() as page:
        methods = {"IDM": [], "DDNM, 20 steps": ["--method", "ddnm", "--sampling_steps", "20"]}
        for name, flags in methods.items():
            call("test.py", "--testset_name", "Samples", "--result_dir", f"{place}/{name}", *flags)
        call("compare.py", "--testset_name", "Samples", "--result_dir", f"{place}/compare", "--methods",
             *(f"{name}={place}/{name}" for name in methods))
        (page_file,) = Path(place, "compare").rglob("*.html")
        page.get(page_file.as_uri())
        page.execute_script("window.scrollTo(0, 500)")  # to the pictures
        time.sleep(2)
        write_atomic(path, page.get_screenshot_as_png())


def call(*command: str) -> None:
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


@contextmanager
def chromium(size: tuple[int, int] = SIZE) -> Iterator["Chrome"]:
    """A window, which keeps what pages log; raises UserError where there is no selenium, or no Chromium with driver."""
    try:
        from selenium import webdriver
    except ImportError as error:
        raise UserError("selenium, of requirements-dev.txt, is not installed") from error
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    driver = shutil.which("chromedriver")
    if not (browser and driver):
        raise UserError("there is no Chromium with its driver here: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
                 f"--window-size={size[0]},{size[1]}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    window = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    window.set_page_load_timeout(PATIENCE)
    try:
        yield window
    finally:
        window.quit()


def until(condition: Callable[[], Any]) -> Any:
    """What a condition returns once that is true; OSError is as good as False."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        try:
            if found := condition():
                return found
        except OSError:
            pass
        time.sleep(0.3)
    raise TimeoutError(f"nothing came of it in {PATIENCE} s")
