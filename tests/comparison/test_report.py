"""The HTML report, opened in a real browser and clicked."""
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import cv2
import numpy as np
import pytest

from utils.comparison.compare import Comparison, score_method
from utils.comparison.published import Published
from utils.comparison.report import write_report
from utils.comparison.tables import remark_lines
from utils.data.testsets import Picture, load_testset

RNG = np.random.default_rng(0)
NAMES = ["plain", "</script><b>&\"x'", "part ü"]


def write(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imencode(".png", pixels)[1].tofile(path)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Comparison, list[Picture]]:
    """Offsets 4, 8, 12 and 16 for picture 1, 2, 10 and colour; twice as much for the second method; some for the third.

    So PSNR falls from picture to picture, 36.09, 30.07, 26.55 and 24.05 dB, and by 6.02 dB to the second method.
    """
    place = tmp_path_factory.mktemp("report")
    for name, shape in (("img_1", (48, 64)), ("img_10", (50, 40)), ("img_2", (16, 16)), ("<i>colour", (30, 30, 3))):
        write(place / "data" / "set" / f"{name}.png", RNG.integers(60, 180, shape, dtype=np.uint8))
    pictures = load_testset("set", place / "data")
    offsets = {"img_1": 4, "img_2": 8, "img_10": 12, "<i>colour": 16}
    for picture in pictures:
        for m in range(3):
            if m < 2 or picture.name in ("img_1", "img_2"):
                write(place / str(m) / f"{picture.name}_PSNR_30.07.png",
                      picture.luminance + offsets[picture.name] * (1 + m % 2))
    methods = [score_method(name, place / str(m), pictures) for m, name in enumerate(NAMES)]
    return Comparison("<set> & Co", 0.1, [p.name for p in pictures], methods, [Published("Known", 27.5)]), pictures


class Page(HTMLParser):
    def __init__(self, text: str):
        super().__init__()
        self.tags, self.scripts, self.open = [], {}, None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.open = dict(attrs).get("id") if tag == "script" else None

    def handle_data(self, data):
        if self.open:
            self.scripts[self.open] = self.scripts.get(self.open, "") + data


def test_the_file_is_whole_and_loads_nothing(tmp_path, made):
    comparison, pictures = made
    shown = write_report(tmp_path / "report.html", comparison, pictures, first=[2], megabytes=10)
    assert shown == [2, 0, 1, 3]
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert not {"b", "i", "set"} & {tag for tag, _ in page.tags}  # names are text
    assert not any({"src", "href", "srcset", "data"} & attrs.keys() for _, attrs in page.tags)
    assert not re.search(r"https?:|@import|url\(", text)
    assert "{{" not in text
    data = json.loads(page.scripts["data"])
    assert data["sources"] == ["Ground truth", *NAMES]
    assert data["remarks"] == remark_lines(comparison) != []
    embedded = json.loads(page.scripts["picture-2"])  # img_10, which the third method lacks
    assert [image is None for image in embedded] == [False, False, False, True]


def test_what_does_not_fit_is_left_out_and_said(tmp_path, made):
    comparison, pictures = made
    shown = write_report(tmp_path / "all.html", comparison, pictures, first=[3], megabytes=1)
    assert shown == [3, 0, 1, 2]
    scripts = Page((tmp_path / "all.html").read_text(encoding="utf-8")).scripts
    sizes = [len(scripts[f"picture-{k}"]) for k in shown]
    write_report(tmp_path / "some.html", comparison, pictures, first=[3], megabytes=(sum(sizes[:2]) + 300) / 1e6)
    scripts = Page((tmp_path / "some.html").read_text(encoding="utf-8")).scripts
    assert scripts.keys() == {"picture-3", "picture-0", "data"}
    data = json.loads(scripts["data"])
    assert data["shown"] == [3, 0]
    assert "2 of 4" in data["notes"][-1]
    assert len(data["table"]) == 5  # of all pictures, and its head
    assert write_report(tmp_path / "none.html", comparison, pictures, first=[], megabytes=0.001) == []


@pytest.fixture
def page(browser, tmp_path, made):
    comparison, pictures = made
    write_report(tmp_path / "report ü.html", comparison, pictures, first=[1], megabytes=10)
    browser.get((tmp_path / "report ü.html").as_uri())
    yield browser
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
    loaded = browser.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)")
    assert [name for name in loaded if not name.startswith("data:")] == []


def one(page, selector: str):
    return page.find_element("css selector", selector)


def column(page, table: str, number: int) -> list[str]:
    return [cell.text for cell in page.find_elements("css selector", f"#{table} tbody tr td:nth-child({number})")]


def choose(page, element: str, text: str) -> None:
    from selenium.webdriver.support.ui import Select
    Select(one(page, f"#{element}")).select_by_visible_text(text)


def pixels(page, image: str) -> np.ndarray:
    """What the browser decoded, (H, W, 3) of RGB."""
    flat, width, height = page.execute_script("""
        const image = document.getElementById(arguments[0]), canvas = document.createElement("canvas");
        canvas.width = image.naturalWidth;
        canvas.height = image.naturalHeight;
        canvas.getContext("2d").drawImage(image, 0, 0);
        const {data, width, height} = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
        return [[...data], width, height];""", image)
    return np.array(flat, np.uint8).reshape(height, width, 4)[..., :3]


def decoded(page) -> None:
    page.execute_async_script("const done = arguments[0]; Promise.all([...document.querySelectorAll('#stage img[src]')]"
                              ".map(image => image.decode())).then(done);")


def test_names_are_shown_as_they_are(page, made):
    assert page.title == one(page, "h1").text == "<set> & Co at 10 %"
    assert column(page, "averages", 1)[:3] == NAMES
    assert [option.text for option in page.find_elements("css selector", "#left-source option")] == ["Ground truth",
                                                                                                    *NAMES]
    assert page.find_elements("css selector", "h1 *, td b, td i, option *") == []
    assert [item.text for item in page.find_elements("css selector", "#remarks li")] == remark_lines(made[0])


def test_tables_are_sorted_by_clicking_and_by_keyboard(page):
    from selenium.webdriver.common.keys import Keys
    assert column(page, "pictures", 1) == ["<i>colour", "img_1", "img_10", "img_2"]  # as the test set has them
    head = page.find_elements("css selector", "#pictures thead tr:last-child th")
    button = head[1].find_element("css selector", "button")
    button.click()
    assert column(page, "pictures", 2) == ["36.09", "30.07", "26.55", "24.05"]
    assert head[1].get_attribute("aria-sort") == "descending"
    button.send_keys(Keys.ENTER)
    assert column(page, "pictures", 2) == ["24.05", "26.55", "30.07", "36.09"]
    assert head[1].get_attribute("aria-sort") == "ascending"
    head[0].find_element("css selector", "button").click()
    assert column(page, "pictures", 1) == ["<i>colour", "img_1", "img_2", "img_10"]  # numbers by value
    assert head[1].get_attribute("aria-sort") is None
    head[5].find_element("css selector", "button").click()
    assert column(page, "pictures", 6) == ["36.09", "30.07", "-", "-"]
    head[5].find_element("css selector", "button").click()
    assert column(page, "pictures", 6) == ["30.07", "36.09", "-", "-"]  # what has no score stays below
    page.find_elements("css selector", "#averages th button")[1].click()
    assert column(page, "averages", 2) == ["33.08", "29.19", "27.50", "23.17"]
    assert column(page, "averages", 1)[2] == "Known, published"


def test_best_and_second_are_marked(page):
    first = page.find_elements("css selector", "#pictures tbody tr")[1].find_elements("css selector", "td")
    assert [cell.text for cell in first[1:7:2]] == ["36.09", "30.07", "36.09"]
    assert [cell.get_attribute("class").split()[-1] for cell in first[1:7:2]] == ["start", "start", "start"]
    assert [cell.value_of_css_property("font-weight") for cell in first[1:7:2]] == ["700", "400", "700"]
    assert "underline" in first[3].value_of_css_property("text-decoration")


def test_the_pictures_are_those_of_the_files(page, made):
    comparison, pictures = made
    for picture in pictures:
        choose(page, "picture", picture.name)
        choose(page, "left-source", "Ground truth")
        choose(page, "right-source", NAMES[1])
        decoded(page)
        left, right = pixels(page, "left").astype(int), pixels(page, "right").astype(int)
        shape = picture.luminance.shape
        assert left.shape == right.shape == (*shape, 3)
        if picture.ycrcb is None:
            assert (left == picture.luminance[..., None]).all()
        else:
            assert np.abs(left - cv2.cvtColor(picture.ycrcb, cv2.COLOR_YCrCb2RGB)).max() == 0
        written = cv2.imread(str(comparison.methods[1].scores[picture.name].file), cv2.IMREAD_GRAYSCALE)
        assert (right == written[..., None]).all()
        score = comparison.methods[1].scores[picture.name]
        assert one(page, "#right-caption").text == f"{NAMES[1]}\n{score.psnr:.2f} dB / {score.ssim:.4f}"
        assert one(page, "#left-caption").text == f"Ground truth\n{picture.name}"


def divider(page) -> float:
    """Where what is seen is divided, as a part of its width; the clipped picture must agree."""
    at, clip = page.execute_script("""
        const frame = document.getElementById("frame");
        const clip = parseFloat(document.getElementById("right").style.clipPath.match(/([\\d.]+)px\\)$/)[1]);
        return [parseFloat(document.getElementById("divider").style.left) / frame.clientWidth,
                (clip - frame.scrollLeft) / frame.clientWidth];""")
    assert clip == pytest.approx(at, abs=1e-6)
    return at


def test_the_slider_moves_by_keyboard_and_by_dragging(page):
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.keys import Keys
    assert divider(page) == 0.5
    one(page, "#split").send_keys(Keys.HOME)
    assert divider(page) == 0
    one(page, "#split").send_keys(Keys.END)
    assert divider(page) == 1
    one(page, "#split").send_keys(*[Keys.ARROW_LEFT] * 4)
    assert divider(page) == pytest.approx(0.98)
    view, grip = one(page, "#frame"), one(page, "#divider")
    page.execute_script("arguments[0].scrollIntoView({block: 'center'})", view)
    width = view.size["width"]

    def drag(element, *moves: tuple[int, int]) -> None:
        actions = ActionChains(page).move_to_element(element).click_and_hold()
        for move in moves:
            actions.move_by_offset(*move)
        actions.release().perform()

    drag(view, (width // 4, 0))
    assert divider(page) == pytest.approx(0.75, abs=0.01)
    assert float(one(page, "#split").get_attribute("value")) == pytest.approx(75, abs=1)
    drag(grip, (-width // 4, 40), (-width // 4, -40))
    assert divider(page) == pytest.approx(0.25, abs=0.01)
    drag(grip, (-width // 4 - 30, 0))  # beyond the edge
    assert divider(page) == 0
    ActionChains(page).move_by_offset(width // 2, 0).perform()  # the button is no longer held
    assert divider(page) == 0


def test_what_is_left_and_right_of_the_slider_is_what_is_chosen(page, tmp_path):
    """From a screenshot of 16 × 16 squares."""
    choose(page, "picture", "img_2")
    choose(page, "left-source", NAMES[0])
    choose(page, "right-source", NAMES[1])
    one(page, "#zoom label:nth-of-type(6)").click()  # 16×
    decoded(page)
    page.execute_script("document.getElementById('look').scrollIntoView()")
    left, right = pixels(page, "left"), pixels(page, "right")
    shot = cv2.imdecode(np.frombuffer(one(page, "#frame").screenshot_as_png, np.uint8), cv2.IMREAD_COLOR)
    assert shot.shape == (256, 256, 3)
    centres = shot[8::16, 8::16]
    assert (centres[:, :7] == left[:, :7]).all()
    assert (centres[:, 9:] == right[:, 9:]).all()
    blocks = shot.reshape(16, 16, 16, 16, 3).swapaxes(1, 2)[:6]  # above the grip
    crisp = (blocks == blocks[:, :, 8:9, 8:9]).all(axis=(2, 3, 4))
    assert crisp[:, :6].all()
    assert crisp[:, 10:15].all()
    one(page, "#swap").click()
    decoded(page)
    assert one(page, "#left-caption b").text == NAMES[1]
    assert (pixels(page, "left") == right).all()
    one(page, "#difference").click()
    shot = cv2.imdecode(np.frombuffer(one(page, "#frame").screenshot_as_png, np.uint8), cv2.IMREAD_COLOR)
    assert np.abs(shot[:100].astype(int) - 8 * 8).max() <= 1  # offsets 8 and 16: 8 apart, shown 8 times brighter


def test_enlarged_pictures_are_panned_and_keep_the_slider_in_sight(page):
    from selenium.webdriver import ActionChains
    choose(page, "picture", "img_1")
    one(page, "#zoom input[value='1']").find_element("xpath", "..").click()
    assert one(page, "#stage").size == {"width": 64, "height": 48}
    one(page, "#zoom input[value='16']").find_element("xpath", "..").click()
    page.set_window_size(700, 600)
    frame = one(page, "#frame")
    middle = page.execute_script("return (arguments[0].scrollLeft + arguments[0].clientWidth / 2) / 1024", frame)
    assert 0 < middle < 1
    before = page.execute_script("return arguments[0].scrollLeft", frame)
    page.execute_script("arguments[0].scrollIntoView({block: 'center'})", frame)
    ActionChains(page).move_to_element_with_offset(frame, -100, 0).click_and_hold().move_by_offset(
        -60, 0).release().perform()
    assert page.execute_script("return arguments[0].scrollLeft", frame) == before + 60
    assert divider(page) == 0.5
    page.set_window_size(1200, 1000)


def test_a_missing_picture_is_said_to_be_missing(page):
    choose(page, "picture", "img_10")
    choose(page, "right-source", NAMES[2])
    assert not one(page, "#right").is_displayed()
    assert one(page, "#right-none").text == f"{NAMES[2]}: no picture of img_10 that could be scored"
    assert one(page, "#right-caption").text == f"{NAMES[2]}\nnot scored"
    choose(page, "picture", "img_1")
    assert one(page, "#right").is_displayed()
    assert not one(page, "#right-none").is_displayed()


def test_pictures_are_chosen_by_buttons_and_in_the_table(page):
    value = lambda: page.execute_script(  # noqa: E731
        "const list = document.getElementById('picture'); return list.selectedOptions[0].textContent")
    assert value() == "img_1"  # the one that was to come first
    one(page, "#next").click()
    assert value() == "<i>colour"
    one(page, "#previous").click()
    one(page, "#previous").click()
    assert value() == "img_2"
    rows = page.find_elements("css selector", "#pictures tbody tr")
    rows[2].find_element("css selector", "td button").click()
    assert value() == "img_10"
    assert rows[2].get_attribute("aria-current") is not None
    rows[1].find_elements("css selector", "td")[3].click()
    assert value() == "img_1"
    assert one(page, "#right-caption b").text == NAMES[1]


@pytest.mark.parametrize("width", [320, 390, 1400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_any_screen_and_follows_its_colours(page, width, scheme):
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride",
                         {"width": width, "height": 800, "deviceScaleFactor": 2, "mobile": width < 500})
    page.execute_cdp_cmd("Emulation.setEmulatedMedia",
                         {"features": [{"name": "prefers-color-scheme", "value": scheme}]})
    try:
        assert page.execute_script("return document.documentElement.scrollWidth") <= width
        ground, ink = (page.execute_script(f"return getComputedStyle(document.body).{name}").split("(")[1].rstrip(")")
                       for name in ("backgroundColor", "color"))
        ground, ink = (sum(map(int, rgb.split(","))) / 3 for rgb in (ground, ink))
        assert (ground > ink) == (scheme == "light")
        assert abs(ground - ink) > 180
    finally:
        page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
