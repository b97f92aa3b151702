"""The demo page: what it computes, and, in a real browser where there is one, what is seen on it."""

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

from hf_aselect import ASelectImageProcessor, DiTForImageClassification, DiTForSemanticSegmentation

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
    assert seen.selection is None and "how it was chosen is not recorded" in app.curve(seen)


def test_masks_cover_the_picture_once(app, segmenter):
    seen = app.load(str(segmenter))
    shown, found = app.masks(seen, picture_of(seen))
    assert shown.size == (336, 336)  # enlarged six times
    assert np.array_equal(sum(mask for mask, _ in found), np.ones((336, 336)))
    assert {name for _, name in found} <= set(seen.model.config.id2label.values())


def test_token_colours_change_with_the_noise_and_not_with_the_signs_of_components(app, saved, monkeypatch):
    seen = app.load(str(saved))
    pixels = app.pixel_values(seen, picture_of(seen))
    own = app.principal_colours(seen, pixels, 50)
    assert own.shape == (4, 4, 3) and own.dtype == np.uint8
    assert not np.array_equal(own, app.principal_colours(seen, pixels, 700))
    svd, calls = torch.linalg.svd, []

    def of_other_signs(matrix, full_matrices=True):
        left, values, right = svd(matrix, full_matrices=full_matrices)
        calls.append(1)
        return (-left, values, -right) if len(calls) == 2 else (left, values, right)

    monkeypatch.setattr(torch.linalg, "svd", of_other_signs)
    assert np.abs(own.astype(int) - app.principal_colours(seen, pixels, 50)).max() <= 1


def test_what_is_no_picture_is_said(app, tmp_path):
    (tmp_path / "no.png").write_text("no picture")
    Image.new("L", (8000, 8000)).save(tmp_path / "large.png")
    whole = tmp_path / "whole.jpg"
    Image.effect_noise((64, 64), 100).save(whole)
    (tmp_path / "cut.jpg").write_bytes(whole.read_bytes()[:800])
    for name, message in (
        ("no.png", "no picture that can be read"),
        ("large.png", "8000 × 8000"),
        ("cut.jpg", "no pict"),
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
        assert sum(app.classes(seen, app.opened(str(path))).values()) == pytest.approx(1)


def test_pictures_are_turned_upright(app, tmp_path):
    picture = Image.new("RGB", (10, 20))
    exif = picture.getexif()
    exif[0x0112] = 6
    picture.save(tmp_path / "turned.jpg", exif=exif)
    assert app.opened(str(tmp_path / "turned.jpg")).size == (20, 10)


def test_models_that_cannot_be_shown_are_refused(app, pixel_folder, saved, tmp_path):
    from hf_aselect import DiTModel

    DiTModel.from_pretrained(pixel_folder, timestep=5).save_pretrained(tmp_path / "tokens")
    with pytest.raises(ValueError, match="the page shows DiTForImageClassification and"):
        app.load(str(tmp_path / "tokens"))


def test_the_spaces_front_matter_and_requirements_fit():
    text = (SPACE / "README.md").read_text(encoding="utf-8")
    front = text.split("---")[1]
    assert "sdk: gradio" in front and "app_file: app.py" in front and "license: apache-2.0" in front
    assert re.search(r"sdk_version: 6\.", front)
    requirements = (SPACE / "requirements.txt").read_text(encoding="utf-8")
    bounds = re.search(r"^gradio.*$", requirements, re.MULTILINE)[0]
    assert bounds in (SPACE.parents[1] / "setup.cfg").read_text(encoding="utf-8")


# In a browser.

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
needs_browser = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="needs Debian's packages chromium and chromium-driver"
)


def serve(*words):
    """Start the page in a process of its own; return it and its address when it answers."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    given = {**os.environ, "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "GRADIO_ANALYTICS_ENABLED": "True"}
    command = [sys.executable, str(SPACE / "app.py"), "--port", str(port), *words]
    process = subprocess.Popen(command, env=given, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}"
    for _ in range(240):
        try:
            urllib.request.urlopen(address, timeout=5).close()
            return process, address
        except OSError:
            assert process.poll() is None, "the page did not start"
            time.sleep(0.5)
    process.kill()
    raise AssertionError("the page did not answer")


@pytest.fixture(scope="module")
def pages(segmenter):
    """The addresses of the embedded classifier's page and of a segmenter's."""
    started = [serve(), serve("--model", str(segmenter))]
    yield [address for _, address in started]
    for process, _ in started:
        process.kill()
        process.wait()


@pytest.fixture
def browser():
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium: pip install '.[space]'")
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


def check_the_page_is_whole(browser, address):
    """Nothing came from elsewhere, nothing went wrong, and nothing is wider than the window."""
    names = browser.execute_script("return performance.getEntriesByType('resource').map(each => each.name)")
    assert names and all(name.startswith((address, "data:", "blob:")) for name in names)
    assert not [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    width = browser.execute_script("return document.documentElement.scrollWidth - window.innerWidth")
    assert width <= 0


@needs_browser
@pytest.mark.parametrize("size", [(1200, 900), (390, 844)])
def test_the_page_in_a_browser(pages, browser, size):
    from selenium.webdriver.common.keys import Keys

    resize(browser, *size)
    browser.get(pages[0])
    example = wait(lambda: all_of(browser, "button.example"))[1]
    # As by keyboard alone: what has the focus is pressed.
    browser.execute_script("arguments[0].focus()", example)
    browser.switch_to.active_element.send_keys(Keys.ENTER)
    wait(lambda: "%" in text_of(browser))
    (label,) = wait(lambda: all_of(browser, "[data-testid=label-output-value]"))
    assert label.text == "Trouser"  # which it is
    tokens = wait(lambda: all_of(browser, "img.tokens"))[0]
    assert "the chosen one" in text_of(browser)
    before, alt = tokens.get_attribute("src"), tokens.get_attribute("alt")
    assert re.match(r"Tokens at timestep \d+:", alt)
    (slider,) = all_of(browser, "input[type=range]")
    browser.execute_script("arguments[0].focus()", slider)
    browser.switch_to.active_element.send_keys(Keys.ARROW_RIGHT * 30)
    wait(lambda: all_of(browser, "img.tokens")[0].get_attribute("alt") not in (alt, None))
    assert all_of(browser, "img.tokens")[0].get_attribute("src") != before
    (curve,) = all_of(browser, "img.curve")
    assert "highest at t = " in curve.get_attribute("alt") and "Why t = " in text_of(browser)
    assert browser.execute_script("return arguments[0].naturalWidth", curve) > 500
    unnamed = [each for each in all_of(browser, "button, input") if not each.accessible_name and each.is_displayed()]
    assert not unnamed, [each.get_attribute("outerHTML")[:200] for each in unnamed]
    check_the_page_is_whole(browser, pages[0])


@needs_browser
def test_a_broken_upload_is_said_on_the_page(pages, browser, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no picture")
    browser.get(pages[0])
    wait(lambda: all_of(browser, "input[type=file]"))[0].send_keys(str(tmp_path / "broken.png"))
    said = wait(lambda: [each.text for each in all_of(browser, ".toast-body, .toast-wrap") if each.text])
    assert any("This file is no picture that can be read. Try a PNG or JPEG." in text for text in said), said
    assert "Traceback" not in text_of(browser)
    # And one that is a picture, sideways and of a mode that browsers do not show.
    Image.new("CMYK", (40, 30)).save(tmp_path / "whole.tif")
    all_of(browser, "input[type=file]")[0].send_keys(str(tmp_path / "whole.tif"))
    wait(lambda: all_of(browser, "[data-testid=label-output-value]"))
    wait(lambda: all_of(browser, "img.tokens"))


@needs_browser
def test_a_segmenters_page_shows_what_is_where(pages, browser):
    resize(browser, 390, 844)
    browser.get(pages[1])
    wait(lambda: all_of(browser, "button.example"))[0].click()
    wait(lambda: "LABEL_" in text_of(browser))
    assert "how it was chosen is not recorded" in text_of(browser)
    check_the_page_is_whole(browser, pages[1])
