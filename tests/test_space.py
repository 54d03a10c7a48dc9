"""The Space answers, in a client and in a real browser: it races, stops, forgets, refuses, and ends with its page."""

import os
import re
import shutil
import subprocess
import sys
import time
from html import unescape
from pathlib import Path

import pytest

APP = Path(__file__).parents[1] / "examples" / "space" / "app.py"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")

# The app, whose models wait at every token for as long as a file says, and leave a line for it in another file.
SERVER = """
import runpy, sys, time
from pathlib import Path
import nudging_hf

pause, trace = map(Path, sys.argv[2:])
generate = nudging_hf.generate


def write_slowly(*args, stopping_criteria, **kwargs):
    def wait(input_ids, scores, **kwargs):
        with trace.open("a") as file:
            file.write("token\\n")
        time.sleep(float(pause.read_text()))
        return stopping_criteria[0](input_ids, scores)

    return generate(*args, stopping_criteria=[wait], **kwargs)


nudging_hf.generate = write_slowly
print(runpy.run_path(sys.argv[1])["demo"].launch(prevent_thread_lock=True, quiet=True)[1], flush=True)
sys.stdin.read()
"""


class Server:
    """The app in a process of its own.

    Attributes:
        url: where it is.
    """

    def __init__(self, folder):
        self._pause, self._trace = folder / "pause", folder / "trace"
        self.pause(0)
        environment = os.environ | {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-c", SERVER, APP, self._pause, self._trace]
        self.process = subprocess.Popen(
            list(map(str, command)), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.url = self.process.stdout.readline().strip()
        assert self.url.startswith("http")

    def pause(self, seconds):
        """Lets the models wait so long at every token."""
        self._pause.write_text(str(seconds))

    def tokens(self):
        """How many tokens were written up to now."""
        return len(self._trace.read_text().splitlines()) if self._trace.exists() else 0

    def ends_writing(self):
        """Waits until the models write no more; returns how many more tokens they wrote."""
        began = count = self.tokens()
        for _ in range(60):
            time.sleep(1)
            before, count = count, self.tokens()
            if count == before:
                return count - began
        raise AssertionError("the models write on")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    pytest.importorskip("gradio")
    server = Server(tmp_path_factory.mktemp("space"))
    yield server
    server.process.communicate(timeout=60)  # It ends with its standard input.


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed: pip install playwright"
    )
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip(f"there is no browser: none of {', '.join(BROWSERS)} is on the path")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture
def page(server, browser):
    server.pause(0)
    page = browser.new_page(viewport={"width": 1280, "height": 1000})
    page.set_default_timeout(60_000)
    page.goto(server.url)
    page.get_by_role("button", name="Ask").wait_for()
    yield page
    page.close()


def press(page, name):
    page.get_by_role("button", name=name, exact=True).click()


def texts(page):
    return [each.inner_text() for each in page.locator(".nudged .answer").all()]


def test_a_client_gets_both_answers(server):
    from gradio_client import Client

    _, html = Client(server.url, verbose=False).predict(
        "Question: Mido has 12 pens. Mido finds 13 more. Mido sells 6. How many pens does Mido have now?",
        api_name="/answer",
    )
    text = unescape(re.sub("<[^>]*>", "", html))
    assert "The base alone" in text and "So the answer is 19." in text and text.count("tokens a second") == 2
    assert "the base alone: “" in html and "the base alone would have written" in html


def test_both_answers_race_and_say_what_the_base_would_have_written(server, page):
    server.pause(0.1)
    press(page, "Ask")
    page.wait_for_function("document.querySelectorAll('.nudged .answer')[1]?.innerText.includes('step')")
    assert all(texts(page)) and not page.locator("[data-tip]").count()  # Both are being written.
    server.pause(0)
    nudge = page.locator("mark a[data-tip]").first
    nudge.wait_for()
    alone, nudged = texts(page)
    assert "So the answer is 19." in nudged and "19" not in alone
    paces = re.findall(r"tokens a second\s+(\d+)", page.locator(".nudged").inner_text())
    assert len(paces) == 2
    tip = r"0\.\d+ (<|≥) γ\nthe base alone: .+\nrank of this token: \d+"
    assert re.fullmatch(tip, nudge.get_attribute("data-tip"))
    nudge.hover()
    content = "getComputedStyle(document.querySelector('mark a[data-tip]:hover'), '::after').content"
    assert "rank of this token" in page.evaluate(content)
    nudge.click()
    assert page.locator("aside:target").inner_text().startswith("From “Let's” on, the base alone")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_an_empty_question_is_refused(server, page):
    page.get_by_label("Question").fill("  ")
    press(page, "Ask")
    page.get_by_text("There is no question: write one first.").wait_for()
    press(page, "Retry")
    page.get_by_text("There is no answer yet: ask something first.").wait_for()
    assert not page.locator(".nudged").count() and not server.ends_writing()


def test_an_answer_is_stopped_asked_for_again_and_forgotten(server, page):
    server.pause(0.3)
    press(page, "Ask")
    page.wait_for_function("document.querySelectorAll('.nudged .answer')[1]?.innerText.length > 5")
    press(page, "Stop")
    page.locator("mark [data-tip]").first.wait_for()  # What is written so far is there, with what is known of it.
    assert server.ends_writing() <= 4
    stopped = texts(page)
    assert 0 < len(stopped[1]) < 100
    server.pause(0)
    press(page, "Retry")
    page.locator("mark a[data-tip]").first.wait_for()
    assert len(texts(page)) == 2 and "So the answer is 19." in texts(page)[1]
    page.get_by_label("Question").fill('Question: Join the last letters of the words "Breto", "Dal".')
    press(page, "Ask")
    page.wait_for_function("document.querySelectorAll('.nudged .answer').length == 4")
    server.pause(0.3)
    press(page, "Clear")
    page.wait_for_function("!document.querySelector('.nudged .answer')")
    assert server.ends_writing() <= 4 and not page.locator(".nudged .answer").count()
    server.pause(0)
    page.get_by_label("Question").fill("Question: Mido has 12 pens. Mido sells 6. How many pens does Mido have now?")
    press(page, "Ask")  # It answers again.
    page.locator("mark a[data-tip]").first.wait_for()
    assert len(texts(page)) == 2


def test_leaving_the_page_ends_the_work(server, page):
    server.pause(0.3)
    press(page, "Ask")
    page.wait_for_function("document.querySelectorAll('.nudged .answer')[1]?.innerText.length > 5")
    page.close()
    assert server.ends_writing() <= 20
