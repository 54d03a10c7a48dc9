"""Tests the plots and the page of an analysis with given figures and without models."""

import base64
import json
import re
from html.parser import HTMLParser

import pytest

from nudging_hf import html_page
from nudging_hf.chats import messages_of
from nudging_hf.study import report
from nudging_hf.study.analysis import Positions, Unit, tables
from nudging_hf.study.prompts import Prompt
from nudging_hf.study.reader import Answer

NAMES = ("positions", "disagreement", "caught", "agreement", "thresholds")
ABOUT = {"base": "<b>base</b> & co", "prompts": "some"}


def figures(large=True, labelled=True):
    """The tables of two prompts at two thresholds."""
    label = {"pattern": "(.)", "answer": "a"} if labelled else {}
    prompts = [Prompt(messages_of("?"), **label) for _ in range(2)]
    answer = vars(Answer("a", [7] * 10, True, words=8, nudged_words=3, nudged_tokens=3))
    agrees = [True, False, None] if large else [None] * 3
    positions = vars(Positions([0.05, 0.45, 0.97], [True, True, False], agrees))
    rows = [{"answer": answer}] * 2
    measured = {
        Unit("along", 0, None if large else 0.4): [{"answer": answer, "positions": positions}] * 2,
        **{Unit("nudged", 0, gamma): rows for gamma in (0.2, 0.6)},
    }
    if labelled:
        measured |= {Unit("base", 0): rows, Unit("nudging model", 0): rows}
    return tables(prompts, measured)


class Page(HTMLParser):
    """The text of a page, its images, and everything that a browser would fetch."""

    def __init__(self, html):
        super().__init__()
        self.text, self.images, self.fetched, self.tags = "", [], [], []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        for name, value in attrs:
            if name in ("src", "srcset", "href"):
                (self.images if value.startswith("data:image/png;base64,") else self.fetched).append(value)

    def handle_data(self, data):
        self.text += data


@pytest.mark.parametrize(("large", "labelled"), [(True, True), (False, False)])
def test_the_page_embeds_every_plot_and_fetches_nothing(tmp_path, large, labelled):
    written = figures(large, labelled)
    path = report.write(tmp_path, written, ABOUT)
    page = Page(path.read_text(encoding="utf-8"))
    assert not page.fetched and not {"script", "link"} & set(page.tags)
    names = ["positions", "disagreement", "caught", *(["agreement"] if large else []), "thresholds"]
    files = [(tmp_path / f"{name}.png").read_bytes() for name in names]
    images = [base64.b64decode(image.split(",")[1]) for image in page.images]
    assert images[1::2] == files and len(images) == 2 * len(files)  # The dark one stands before each.
    assert all(image.startswith(b"\x89PNG") for image in images) and not set(images[::2]) & set(files)
    assert {path.stem for path in tmp_path.glob("*.png")} == set(names)
    read = json.loads((tmp_path / "tables.json").read_text(encoding="utf-8"))
    assert read == json.loads(json.dumps({"about": ABOUT, **written}))
    assert ("Accuracy of each model alone" in page.text) is labelled
    assert ("nudging model's, as no large one was given" in page.text) is not large


def test_the_paper_s_figures_are_compared_with_the_measured_ones():
    found = report.paper_comparison(figures())
    assert [paper.replace("\u00a0", " ") for _, paper, _ in found] == [
        "90 %", "over 80 %", "11 %", "65 to 83 % (Llama-2), 58 to 88 % (Gemma-2)"
    ]  # fmt: skip
    assert [here.replace("\u00a0", " ") for _, _, here in found] == ["100 %", "100 %", "66.7 %", "50.0 %"]


def test_the_figures_and_their_source_are_on_the_page():
    page = Page(report.render(figures(), ABOUT, *[dict.fromkeys(NAMES, b"...")] * 2))
    text = re.sub(r"\s+", " ", page.text)  # This also matches non-breaking spaces.
    for expected in ("arXiv 2410.09300", "66.7 %", "37.5 %", "30.0 %", "6 positions", "4 are alignment-related"):
        assert expected in text
    assert (
        "It cannot be told from so few questions whether nudging helps: with γ = 0.2, 2 of 2 answers are right" in text
    )
    assert "<b>base</b> & co" in text and "b" not in page.tags  # Texts about models are escaped.


def test_a_share_of_nothing_is_shown_as_a_dash():
    """All positions are in one bin and none is alignment-related, so nine bins and most shares are empty."""
    prompts = [Prompt(messages_of("?"))]
    row = {"answer": vars(Answer("a", [7], False, 1)), "positions": vars(Positions([1.0], [False], [True]))}
    written = tables(prompts, {Unit("along", 0): [row]})
    images = report.plots(written)
    assert set(images) == {"positions", "disagreement", "caught"}
    assert images == report.plots(written)  # The same figures make the same files.
    page = Page(report.render(written, ABOUT, images, images))
    assert "nan" not in page.text.lower() and "None" not in page.text
    assert [here for _, _, here in report.paper_comparison(written)] == ["-", "-", "0\u00a0%", "-"]


def test_the_page_and_its_plots_follow_the_reader_s_choice_of_light_or_dark():
    html = report.render(figures(), ABOUT, *[dict.fromkeys(NAMES, b"...")] * 2)
    assert "color-scheme: light dark" in html and "#" not in report._STYLE  # All colours are those of all pages.
    assert html.count('<source media="(prefers-color-scheme: dark)"') == len(NAMES)
    colours = dict(re.findall(r"--(\w+): light-dark\((.+?)\)", html_page.COLOURS))
    assert colours["paper"] == "#fff, #16181b" and report._DARK[2] == "#16181b"  # A plot has the ground of its page.
