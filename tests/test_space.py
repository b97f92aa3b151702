"""The demo page: what it computes, and, in a real browser where there is one, what is seen on it."""

import ast
import importlib.util
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import hf_aselect
from hf_aselect import ASelectImageProcessor, DiTForImageClassification, DiTForSemanticSegmentation, DiTModel

SPACE = Path(__file__).parents[1] / "examples" / "space"
pytest.importorskip("gradio", reason="the page needs gradio: pip install '.[space]'")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # of gradio's own


@pytest.fixture(scope="module")
def app():
    sys.path.insert(0, str(SPACE))
    import app

    yield app
    sys.path.remove(str(SPACE))


@pytest.fixture(scope="module")
def segmenter(pixel_folder, tmp_path_factory):
    """A saved segmenter whose decoder is not trained."""
    torch.manual_seed(0)
    model = DiTForSemanticSegmentation.from_pretrained(pixel_folder, timestep=50, num_labels=4)
    folder = tmp_path_factory.mktemp("segmenter")
    model.save_pretrained(folder)
    ASelectImageProcessor.from_model_config(model.config).save_pretrained(folder)
    return folder


def picture_of(seen):
    """The first of a page's examples."""
    return next(iter(seen.examples.values()))


@pytest.fixture
def saved(classifier, tmp_path):
    classifier.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def test_probabilities_are_those_of_the_model(app, saved):
    seen = app.load(str(saved))
    found = app.classes(seen, picture_of(seen))
    pixels = seen.processor(picture_of(seen), return_tensors="pt").pixel_values
    with torch.no_grad():
        expected = DiTForImageClassification.from_pretrained(saved)(pixels).logits[0].softmax(-1)
    assert list(found) == [f"LABEL_{index}" for index in range(4)]
    assert list(found.values()) == pytest.approx(expected.tolist())
    assert seen.selection is None and "How it was selected is not recorded" in app.curve(seen)


def test_a_saved_image_processor_is_the_one_that_is_used(app, saved, classifier):
    assert app.load(str(saved)).processor.do_center_crop
    ASelectImageProcessor(size=8, do_center_crop=False).save_pretrained(saved)
    assert not app.load(str(saved)).processor.do_center_crop


def test_the_overlay_tells_the_masks_in_colours_numbers_and_words(app, segmenter):
    seen = app.load(str(segmenter))
    picture = picture_of(seen)
    found = app.mask(seen, picture, (336, 168))
    assert found.shape == (168, 336) and set(np.unique(found).tolist()) <= set(range(4))
    seen.model.config.id2label = {index: f"<{index}> & more" for index in range(4)}
    drawn = app.overlay(seen, picture)
    named = re.findall(
        r"<li><b style=.background: (#\w+); color: (?:black|white).>(\d)</b>&lt;(\d)&gt; &amp; more, ", drawn
    )
    shares = [float(share) for share in re.findall(r"more, ([\d.]+)%</li>", drawn)]
    assert len(named) == len(shares) == len(np.unique(app.mask(seen, picture, (336, 336))))
    assert len({colour for colour, _, _ in named}) == len(named)
    assert [number for _, number, _ in named] == ["1", "2", "3", "4"][: len(named)]
    assert shares == sorted(shares, reverse=True) and sum(shares) == pytest.approx(100, abs=0.3)
    assert f'alt="Classes in the image: &lt;{named[0][2]}&gt; &amp; more, {shares[0]}%' in drawn


def test_classes_in_one_picture_have_colours_of_their_own(app):
    # As where eleven classes share eight colours: the third and the last would have the same.
    assert app.colours_of([2, 10]) == [app.COLOURS[2], app.COLOURS[0]]
    assert app.colours_of([10, 0, 2]) == [app.COLOURS[2], app.COLOURS[0], app.COLOURS[1]]
    assert len(set(app.colours_of(list(range(3, 11))))) == 8
    assert len(app.colours_of(list(range(30)))) == 30


def test_a_number_stands_within_its_class(app):
    where = np.zeros((200, 300), dtype=bool)
    where[:, 40:80] = where[180:, :] = True  # an L, whose mean lies beside it
    column, row = app.middle(where)
    assert where[row - 8 : row + 9, column - 8 : column + 9].all()
    where[:] = False
    where[7, 11] = True
    assert app.middle(where) == (11, 7)
    assert app.middle(np.ones((1, 1), dtype=bool)) == (0, 0)


def test_a_segmenter_sees_the_whole_of_a_wide_picture_and_a_classifier_its_middle(app, saved, segmenter):
    wide = Image.new("RGB", (64, 32))
    other = wide.copy()
    other.paste((255, 255, 255), (0, 0, 12, 32))
    for folder, sees in ((segmenter, True), (saved, False)):
        seen = app.load(str(folder))
        assert torch.equal(app.pixel_values(seen, wide), app.pixel_values(seen, other)) is not sees


def test_pictures_are_put_on_the_page_in_a_size_fit_for_it(app):
    small = Image.new("RGB", (2, 1))
    small.putpixel((0, 0), (255, 0, 0))
    large = app.shown(small)
    assert large.size == (384, 192) and sorted(large.getcolors()) == [(192 * 192, (0, 0, 0)), (192 * 192, (255, 0, 0))]
    assert app.shown(Image.new("L", (9000, 3))).size == (768, 1)
    assert app.shown(Image.new("I;16", (500, 400), 32768)).getpixel((0, 0)) == (128, 128, 128)


def test_token_colours_change_with_the_noise_and_not_with_the_signs_of_components(app, saved, monkeypatch):
    seen = app.load(str(saved))
    pixels = app.pixel_values(seen, picture_of(seen))
    own, noisy = (app.principal_colours(seen, pixels, timestep) for timestep in (50, 700))
    assert own.shape == (4, 4, 3) and own.dtype == np.uint8
    assert not np.array_equal(own, noisy)
    svd, calls = torch.linalg.svd, []

    def of_other_signs_and_order(matrix, full_matrices=True):
        left, values, right = svd(matrix, full_matrices=full_matrices)
        calls.append(matrix.shape)
        if len(calls) != 2:  # the second is of the tokens at the slider's timestep
            return left, values, right
        order = [1, 2, 0, *range(3, len(values))]
        return -left[:, order], values[order], -right[order]

    monkeypatch.setattr(torch.linalg, "svd", of_other_signs_and_order)
    assert np.abs(noisy.astype(int) - app.principal_colours(seen, pixels, 700)).max() <= 1
    assert len(calls) == 3


def test_what_is_no_picture_is_said(app, tmp_path):
    (tmp_path / "no.png").write_text("no image")
    Image.new("L", (8000, 8000)).save(tmp_path / "large.png")
    whole = tmp_path / "whole.jpg"
    Image.effect_noise((64, 64), 100).save(whole)
    (tmp_path / "cut.jpg").write_bytes(whole.read_bytes()[:800])
    Image.new("1", (20000, 20000)).save(tmp_path / "bomb.png")
    for name, message in (
        ("no.png", "not an image that can be read"),
        ("large.png", "8000 × 8000"),
        ("bomb.png", "too many pixels, but at most 50 million"),
        ("cut.jpg", "not an image"),
    ):
        with pytest.raises(app.gr.Error, match=message):
            app.opened(str(tmp_path / name))
    assert app.opened(None) is None


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "I;16", "CMYK", "1", "LA"])
def test_pictures_of_every_mode_and_size_are_taken(app, saved, tmp_path, mode):
    seen = app.load(str(saved))
    path = tmp_path / ("picture.tif" if mode == "CMYK" else "picture.png")
    for size in ((1, 1), (300, 7)):
        Image.new(mode, size).save(path)
        picture = app.opened(str(path))
        assert sum(app.classes(seen, picture).values()) == pytest.approx(1)
        assert app.shown(picture).mode == "RGB"


def test_pictures_are_turned_upright(app, tmp_path):
    picture = Image.new("RGB", (10, 20))
    exif = picture.getexif()
    exif[0x0112] = 6
    picture.save(tmp_path / "turned.jpg", exif=exif)
    assert app.opened(str(tmp_path / "turned.jpg")).size == (20, 10)


def test_models_that_cannot_be_shown_are_refused(app, pixel_folder, saved, tmp_path):
    DiTModel.from_pretrained(pixel_folder, timestep=5).save_pretrained(tmp_path / "tokens")
    with pytest.raises(ValueError, match="the page shows DiTForImageClassification and"):
        app.load(str(tmp_path / "tokens"))


def test_the_page_uses_public_names_only():
    nodes = list(ast.walk(ast.parse((SPACE / "app.py").read_text(encoding="utf-8"))))
    taken = [node for node in nodes if isinstance(node, ast.ImportFrom) and node.module.startswith("hf_aselect")]
    assert taken and {node.module for node in taken} == {"hf_aselect"}
    assert {alias.name for node in taken for alias in node.names} <= set(hf_aselect.__all__)


def test_the_spaces_front_matter_and_requirements_fit():
    text = (SPACE / "README.md").read_text(encoding="utf-8")
    front = text.split("---")[1]
    assert "sdk: gradio" in front and "app_file: app.py" in front and "license: apache-2.0" in front
    assert re.search(r"sdk_version: 6\.", front)
    assert len(re.search(r"short_description: (.*)", front)[1]) <= 60  # what the Hub takes
    requirements = (SPACE / "requirements.txt").read_text(encoding="utf-8")
    bounds = re.search(r"^gradio.*$", requirements, re.MULTILINE)[0]
    assert bounds in (SPACE.parents[1] / "setup.cfg").read_text(encoding="utf-8")


# In a browser.

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
missing = [] if CHROMIUM and DRIVER else ["Debian's packages chromium and chromium-driver"]
missing += [] if importlib.util.find_spec("selenium") else ["selenium: pip install '.[space]'"]
needs_browser = pytest.mark.skipif(bool(missing), reason=f"needs {' and '.join(missing)}")


# Runs a script, and ends it where it looks for another machine.
ALONE = """
import os, runpy, sys

def watch(event, given):
    if event in ("socket.getaddrinfo", "socket.gethostbyname"):
        host = given[0]
    elif event == "socket.connect" and isinstance(given[1], tuple):
        host = given[1][0]
    else:
        return
    if host not in (None, "", "localhost", "127.0.0.1", "::1", "0.0.0.0"):
        os._exit(3)

sys.addaudithook(watch)
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def serve(folder, *words):
    """Start the page in a process of its own; return it and its address."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    # Nothing says that there is no network: the page is to do without it by itself.
    given = {name: value for name, value in os.environ.items() if name not in ("HF_HUB_OFFLINE", "MODEL_ID")}
    given |= {"TQDM_DISABLE": "1", "GRADIO_ANALYTICS_ENABLED": "True", "TMPDIR": str(folder)}
    command = [sys.executable, "-c", ALONE, str(SPACE / "app.py"), "--port", str(port), *words]
    process = subprocess.Popen(command, env=given, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return process, f"http://127.0.0.1:{port}"


def wait_for_answer(process, address):
    """Return when a page answers."""
    for _ in range(240):
        try:
            urllib.request.urlopen(address, timeout=5).close()
        except OSError:
            assert process.poll() is None, f"the page ended with {process.returncode}; 3: it looked for a network"
            time.sleep(0.5)
        else:
            return
    raise AssertionError("the page did not answer")


@pytest.fixture(scope="module")
def pages(segmenter, tmp_path_factory):
    """The addresses of the pages of the embedded classifier and of a folded segmenter."""
    folded = tmp_path_factory.mktemp("folded")
    DiTForSemanticSegmentation.from_pretrained(segmenter).fold().save_pretrained(folded)
    temporary = tmp_path_factory.mktemp("served")  # a page that is killed leaves its images
    started = [serve(temporary), serve(temporary, "--model", str(folded))]
    try:
        for process, address in started:
            wait_for_answer(process, address)
        yield [address for _, address in started]
        assert [process.poll() for process, _ in started] == [None] * 2  # 3: it looked for a network
    finally:
        for process, _ in started:
            process.kill()
            process.wait()


@pytest.fixture
def browser():
    from selenium import webdriver  # here, as in others below: it is not installed everywhere

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


def wait(condition, seconds=20):
    """Return what a condition gives as soon as it is something."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            found = condition()
        except Exception:  # the page is still being drawn
            found = None
        if found:
            return found
        time.sleep(0.2)
    raise AssertionError("it did not appear on the page")


def resize(browser, width, height):
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


def all_of(browser, selector):
    return browser.find_elements("css selector", selector)


def text_of(browser):
    return browser.find_element("css selector", "body").text


def tab_to(browser, name):
    """Press the tabulator until what has the focus is called so."""
    from selenium.webdriver import ActionChains, Keys

    for _ in range(40):
        ActionChains(browser).send_keys(Keys.TAB).perform()
        focused = browser.switch_to.active_element
        if focused.tag_name in ("button", "input") and name in focused.accessible_name:
            return focused
    raise AssertionError(f"the tabulator does not come to {name!r}")


# Texts whose contrast to what is behind them is below 4.5, as WCAG counts it.
PALE = """
const light = rgb => rgb.map(v => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
const parts = colour => colour.match(/[\\d.]+/g).map(Number);
function behind(each) {
    for (; each; each = each.parentElement) {
        const colour = parts(getComputedStyle(each).backgroundColor);
        if (colour.length < 4 || colour[3] > 0.5) return light(colour.slice(0, 3));
    }
    return 1;
}
return [...document.querySelectorAll("body *")].filter(each => {
    if (!each.offsetParent || ![...each.childNodes].some(n => n.nodeType == 3 && n.textContent.trim())) return false;
    const [low, high] = [light(parts(getComputedStyle(each).color).slice(0, 3)), behind(each)].sort((a, b) => a - b);
    return (high + 0.05) / (low + 0.05) < 4.5;
}).map(each => each.textContent);
"""


def check_the_page_is_whole(browser, address):
    """Nothing came from elsewhere, went wrong, is wider than the window, too pale, or without a name."""
    names = browser.execute_script("return performance.getEntriesByType('resource').map(each => each.name)")
    assert names and all(name.startswith((address, "data:", "blob:")) for name in names)
    assert not [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    width = browser.execute_script("return document.documentElement.scrollWidth - window.innerWidth")
    assert width <= 0
    wait(lambda: not browser.execute_script(PALE), 5)  # not at once: what is being computed is pale
    unnamed = [each for each in all_of(browser, "button, input") if not each.accessible_name and each.is_displayed()]
    unnamed += [each for each in all_of(browser, "img") if not each.get_attribute("alt")]
    assert not unnamed, [each.get_attribute("outerHTML")[:200] for each in unnamed]


@needs_browser
@pytest.mark.parametrize(("size", "theme"), [((1200, 900), "light"), ((390, 844), "dark")])
def test_the_page_in_a_browser(pages, browser, size, theme):
    from selenium.webdriver import Keys

    resize(browser, *size)
    browser.get(f"{pages[0]}/?__theme={theme}")
    wait(lambda: len(all_of(browser, "button.example")) == 6)
    # By keyboard alone, from the top.
    tab_to(browser, "Trouser").send_keys(Keys.ENTER)
    wait(lambda: "%" in text_of(browser))
    (label,) = wait(lambda: all_of(browser, "[data-testid=label-output-value]"))
    assert label.text == "Trouser"  # which it is
    tokens = wait(lambda: all_of(browser, "img.tokens"))[0]
    assert "the selected timestep" in text_of(browser)
    before, alt = tokens.get_attribute("src"), tokens.get_attribute("alt")
    assert re.match(r"Tokens at timestep \d+:", alt)
    tab_to(browser, "slider for Timestep: 0 is least noise, 999 is pure noise").send_keys(Keys.ARROW_RIGHT * 30)
    wait(lambda: all_of(browser, "img.tokens")[0].get_attribute("alt") not in (alt, None))
    assert all_of(browser, "img.tokens")[0].get_attribute("src") != before
    (curve,) = all_of(browser, "img.curve")
    assert "highest at t = " in curve.get_attribute("alt") and "Why t = " in text_of(browser)
    assert browser.execute_script("return arguments[0].naturalWidth", curve) > 500
    # Wider than a phone: it slides in a box of its own.
    end = "const box = arguments[0].parentElement; box.scrollLeft = 9999; return box.getBoundingClientRect().right"
    assert browser.execute_script(end, curve) <= size[0]
    assert browser.execute_script("return arguments[0].getBoundingClientRect().right", curve) <= size[0]
    check_the_page_is_whole(browser, pages[0])


@needs_browser
def test_a_broken_upload_is_said_on_the_page(pages, browser, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no image")
    browser.get(pages[0])
    wait(lambda: all_of(browser, "input[type=file]"))[0].send_keys(str(tmp_path / "broken.png"))
    said = wait(lambda: [each.text for each in all_of(browser, ".toast-body, .toast-wrap") if each.text])
    assert any("This file is not an image that can be read. Try a PNG or JPEG." in text for text in said), said
    assert "Traceback" not in text_of(browser)
    # And one that is an image, sideways and of a mode that browsers do not show.
    Image.new("CMYK", (40, 30)).save(tmp_path / "whole.tif")
    all_of(browser, "input[type=file]")[0].send_keys(str(tmp_path / "whole.tif"))
    wait(lambda: all_of(browser, "[data-testid=label-output-value]"))
    wait(lambda: all_of(browser, "img.tokens"))


@needs_browser
def test_a_folded_segmenters_page_shows_what_is_where_and_has_no_slider(pages, browser):
    resize(browser, 390, 844)
    browser.get(pages[1])
    wait(lambda: all_of(browser, "button.example"))[0].click()
    (overlay,) = wait(lambda: all_of(browser, "img.overlay"))
    assert re.match(r"Classes in the image: LABEL_\d, [\d.]+%", overlay.get_attribute("alt"))
    assert browser.execute_script("return arguments[0].naturalWidth", overlay) == 336
    assert re.search(r"LABEL_\d, [\d.]+%", all_of(browser, ".legend")[0].text)
    assert "How it was selected is not recorded" in text_of(browser)
    tokens = wait(lambda: all_of(browser, "img.tokens"))[0]
    assert tokens.get_attribute("alt").startswith("Tokens at timestep 50:")
    assert "This model is folded at t = 50" in text_of(browser)
    assert not [each for each in all_of(browser, "input[type=range]") if each.is_displayed()]
    check_the_page_is_whole(browser, pages[1])
