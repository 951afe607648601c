"""The page of app.py in Chromium: uploads, recordings, the timeline, downloads, two users, keyboard and labels."""

import json
import re
import shutil
from pathlib import Path

import pytest
from clips import write_clip
from models import save_model_with_towers
from page_server import running_page


pytest.importorskip("gradio", reason="gradio is not installed; see requirements-space.txt")
sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed; see requirements-space.txt")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")]

FLAGS = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
FLAGS += "--disable-component-update --disable-sync --use-fake-device-for-media-stream --use-fake-ui-for-media-stream"
DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def place(tmp_path_factory, llm_folder, assemble) -> Path:
    """A folder with a model and two clips."""
    folder = tmp_path_factory.mktemp("browser")
    save_model_with_towers(folder, llm_folder(), assemble)
    write_clip(folder / "one.mp4", 0.8)
    write_clip(folder / "long.mp4", 4.0, seed=1)
    return folder


@pytest.fixture(scope="module")
def server(place, tmp_path_factory):
    examples = ["--example", place / "one.mp4", "that is just great", "--example", place / "voice.wav", "no"]
    with running_page(tmp_path_factory.mktemp("page"), place / "model", *examples) as running:
        yield running


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS.split())


@pytest.fixture
def open_page(browser, server):
    """`open_page(size)`: the page in a window of its own. It may ask no other host and must raise no error."""
    windows, faults = [], []

    def opened(size: dict = DESKTOP):
        window = browser.new_context(viewport=size, permissions=["microphone", "camera"])
        windows.append(window)
        page = window.new_page()
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("request", lambda request: faults.extend(elsewhere(request.url)))
        page.goto(server.url)
        page.locator("#ask").wait_for()
        return page

    def elsewhere(url: str) -> list[str]:
        return [] if url.startswith((server.url, "data:", "blob:")) else [url]

    yield opened
    for window in windows:
        window.close()
    assert faults == []


def choose(page, file: Path) -> None:
    page.set_input_files("#video input[type=file]", str(file))
    page.locator("#video video[src^=blob]").wait_for()


def answer(page) -> str:
    """Asks, and returns the label when the answer is there."""
    page.get_by_role("button", name="Answer", exact=True).click()
    page.locator(".egmf-downloads").wait_for()
    return page.locator(".egmf-answer strong").inner_text()


def test_a_clip_is_uploaded_answered_and_downloaded(open_page, place, recognize, server):
    page = open_page()
    choose(page, place / "long.mp4")
    label = answer(page)
    wanted = recognize(str(place / "long.mp4"), return_timestamps=True)
    assert label == wanted["label"]
    assert f"{100 * wanted['probabilities'][label]:.1f} %" in page.locator(".egmf-shares").inner_text()
    assert server.uploads() == []

    segments = page.locator(".egmf-timeline button")
    assert segments.count() == len(wanted["chunks"]) > 2
    last = wanted["chunks"][-1]
    assert segments.last.inner_text() in (last["label"], "")
    assert f": {last['label']}, " in segments.last.get_attribute("aria-label")
    segments.last.click()
    player = page.locator("#video video")
    page.wait_for_function(f"document.querySelector('#video video').currentTime >= {last['timestamp'][0] - 0.01}")
    assert player.evaluate("player => player.currentTime") <= last["timestamp"][1] + 0.1
    page.wait_for_function("document.querySelector('.egmf-timeline li:last-child [aria-current=true]')")

    for name, suffix in (("JSON", "json"), ("CSV", "csv"), ("WebVTT", "vtt")):
        with page.expect_download() as download:
            page.get_by_role("link", name=name).click()
        assert download.value.suggested_filename == f"long.{suffix}"
        content = download.value.path().read_text(encoding="utf-8")
        if name == "JSON":
            assert json.loads(content)[-1]["probabilities"] == pytest.approx(wanted["probabilities"])
        elif name == "CSV":
            assert len(content.splitlines()) == len(wanted["chunks"]) + 2
        else:
            assert content.count("-->") == len(wanted["chunks"])


def test_a_second_question_about_a_clip_that_the_server_has_deleted(open_page, place, recognize, server):
    page = open_page()
    choose(page, place / "one.mp4")
    answer(page)
    page.get_by_label("What is said").fill("that is just great")
    page.get_by_label("Your own labels").fill("calm, tense")
    page.get_by_role("button", name="Answer", exact=True).click()
    page.locator(".egmf-shares th", has_text="tense").wait_for()
    wanted = recognize(str(place / "one.mp4"), text="that is just great", candidate_labels=["calm", "tense"])
    assert page.locator(".egmf-answer strong").inner_text() == wanted["label"]
    assert server.uploads() == []


def test_examples(open_page, place, recognize):
    page = open_page()
    for file, words in (("one.mp4", "that is just great"), ("voice.wav", "no"), ("one.mp4", "that is just great")):
        page.get_by_role("gridcell", name=words, exact=True).click()
        page.wait_for_function(f"document.querySelector('textarea').value == '{words}'")
        page.wait_for_timeout(500)
        page.locator("#ask").click()
        wanted = recognize(str(place / file), text=words)
        share = f"{100 * wanted['probabilities'][wanted['label']]:.0f} %"
        page.locator(".egmf-answer", has_text=f"{wanted['label']} {share}").wait_for()
    assert (place / "one.mp4").is_file()


def test_the_microphone(open_page):
    page = open_page()
    page.get_by_role("tab", name="Sound").click()
    sound = page.locator("#sound")
    sound.get_by_label("Record audio").click()
    sound.get_by_role("button", name="Record", exact=True).click()
    page.wait_for_timeout(1500)
    sound.get_by_role("button", name="Stop").first.click()
    page.locator("#sound audio[src^=blob]").last.wait_for()
    assert answer(page)
    for row in page.locator(".egmf-gates tbody tr").all_inner_texts():
        assert row.split("\t")[1:] == ["0 %", "100 %", "0 %"]  # only the voice


def test_the_camera(open_page):
    """A webm without a length: all of it is read, and the player can jump in it."""
    page = open_page()
    video = page.locator("#video")
    video.get_by_label("Capture from camera").click()
    video.get_by_text("Click to Access Webcam").click()
    record = video.get_by_role("button", name="start recording")
    record.click()
    page.wait_for_timeout(3000)
    record.click()
    page.locator("#video video[src^=blob]").wait_for()
    assert answer(page)
    weights = page.locator(".egmf-gates tbody tr").first.inner_text().split("\t")
    assert weights[1] == "0 %" and "0 %" not in weights[2:]  # voice and face
    assert page.locator(".egmf-notes").count() == 0
    page.locator(".egmf-timeline button").last.click()
    page.wait_for_function("document.querySelector('#video video').duration < 60")


def test_a_broken_clip_then_a_good_one(open_page, place):
    page = open_page()
    page.set_input_files("#video input[type=file]", str(place / "broken.mp4"))
    page.locator("#ask").click()
    error = page.get_by_role("alert").filter(has_text="Cannot read")
    error.wait_for()
    assert error.inner_text() == "Cannot read 'broken.mp4': it is not an audio or video file, or its index is missing."
    page.reload()
    page.locator("#ask").click()
    page.get_by_role("alert").filter(has_text="There is nothing to answer").wait_for()
    choose(page, place / "one.mp4")
    assert answer(page) and page.get_by_role("alert").filter(has_text="nothing").count() == 0


def test_answer_waits_for_an_upload(open_page, place):
    page, uploads = open_page(), []
    page.route("**/upload?*", lambda upload: uploads.append(upload))  # holds them
    for end in ("abort", "continue_"):
        page.set_input_files("#video input[type=file]", str(place / "one.mp4"))
        page.locator("#ask:disabled").wait_for()
        getattr(uploads.pop(), end)()
        page.locator("#ask:enabled").wait_for()
    assert answer(page)


def test_two_users_at_once(open_page, place, recognize):
    files = [place / "one.mp4", place / "long.mp4"]
    pages = [open_page(), open_page()]
    for page, file in zip(pages, files, strict=True):
        choose(page, file)
    for page in pages:
        page.locator("#ask").click()
    for page, file in zip(pages, files, strict=True):
        page.locator(".egmf-downloads").wait_for()
        wanted = recognize(str(file), return_timestamps=True)
        label = wanted["label"]
        assert page.locator(".egmf-answer strong").inner_text() == label
        assert f"{100 * wanted['probabilities'][label]:.1f} %" in page.locator(".egmf-shares").inner_text()


def test_keyboard_and_screen_readers(open_page, place):
    page = open_page()
    choose(page, place / "long.mp4")
    page.get_by_label("What is said").focus()
    page.keyboard.press("Tab")
    assert page.get_by_label("Your own labels").evaluate("one => one == document.activeElement")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.locator(".egmf-downloads").wait_for()
    assert page.locator("#answer").get_attribute("aria-live") == "polite"
    first, second = page.locator(".egmf-timeline button").all()[:2]
    first.focus()
    page.keyboard.press("Tab")
    assert second.evaluate("one => one == document.activeElement")
    page.keyboard.press("Enter")
    page.wait_for_function("document.querySelector('#video video').currentTime > 0.5")
    snapshot = page.locator("body").aria_snapshot()
    assert len(re.findall(r"^ *- '?(?:button|textbox|link|tab) \"", snapshot, re.M)) > 10
    unnamed = re.findall(r"^ *- (?:button|textbox|link|combobox|tab)(?: \[.*\])?:?$", snapshot, re.M)
    assert unnamed == []
    assert page.get_by_role("heading", name="Use and misuse").is_visible()
    assert "Do not use it to decide about people" in page.locator("#use-and-misuse").inner_text()


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_nothing_is_cut_off(open_page, place, size, tmp_path):
    page = open_page(size)
    choose(page, place / "long.mp4")
    answer(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= size["width"]
    for part in ("#video", ".egmf-timeline", "#ask", ".egmf-shares", ".egmf-gates", ".egmf-downloads"):
        box = page.locator(part).first.bounding_box()
        assert box["width"] > 150 and box["x"] >= 0 and box["x"] + box["width"] <= size["width"]
    for segment in page.locator(".egmf-timeline button").all():
        assert min(segment.bounding_box()["height"], segment.bounding_box()["width"]) >= 24  # for fingers
