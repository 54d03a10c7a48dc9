"""Tests the page: it preserves any text, marks the nudged characters, and loads and runs nothing."""

import re
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nudging_hf import page
from nudging_hf.provenance import Piece

ODD = ["</script>", "</div>", "<!--", "]]>", "&amp;", "&#13;", '"', "'", "\r\n", "\n", " ", "\u2028", "\u202e", "\0",
       "\U0001f469\u200d\U0001f4bb", "{title}", "%s", "a"]  # fmt: skip
TEXT = st.one_of(st.text(), st.lists(st.sampled_from(ODD)).map("".join))
PIECES = st.lists(
    st.builds(Piece, TEXT.filter(bool), st.booleans(), st.none() | st.floats(0, 1)),
    max_size=8,
)
ANSWERS = st.lists(st.builds(page.MarkedAnswer, TEXT, PIECES, st.dictionaries(TEXT, TEXT, max_size=2)), max_size=3)


class Reader(HTMLParser):
    """Reads the texts of a page, which of their characters are marked, and all tags and tips."""

    def __init__(self, html):
        super().__init__()
        self.texts = []  # For each element of class "text": its kind, its text, and which characters are in <mark>.
        self.figures = []
        self.tags, self.tips, self.title = [], [], ""
        self._open = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append((tag, attributes))
        if tag not in ("meta", "!doctype"):
            self._open.append((tag, attributes.get("class", "")))
        if "text" in attributes.get("class", ""):
            self.texts.append((attributes["class"].split()[1], [], []))
        if tag in ("dt", "dd"):
            self.figures.append("")
        if "data-tip" in attributes:
            self.tips.append(attributes["data-tip"])

    def handle_endtag(self, tag):
        assert self._open.pop()[0] == tag

    def handle_data(self, data):
        if any("text" in kind for _, kind in self._open):
            self.texts[-1][1].append(data)
            self.texts[-1][2].extend([any(tag == "mark" for tag, _ in self._open)] * len(data))
        elif self._open and self._open[-1][0] in ("dt", "dd"):
            self.figures[-1] += data
        elif self._open and self._open[-1][0] == "title":
            self.title += data


@given(ANSWERS, TEXT)
def test_the_page_preserves_any_text(answers, title):
    reader = Reader(page.render(answers, 0.4, title))
    assert not reader._open and reader.title == title
    expected = [
        text
        for answer in answers
        for text in (("prompt", answer.prompt), ("answer", "".join(piece.text for piece in answer.pieces)))
    ]
    assert [(kind, "".join(text)) for kind, text, _ in reader.texts] == expected
    for answer in answers:
        for said in (said for pair in answer.figures.items() for said in pair):
            assert said in reader.figures


@given(PIECES)
def test_exactly_the_nudged_characters_are_marked_except_for_white_space(pieces):
    (_, (_, text, marked)) = Reader(page.render([page.MarkedAnswer("", pieces)], 0.4)).texts
    nudged = [piece.nudged for piece in pieces for _ in piece.text]
    assert [m for m, c in zip(marked, "".join(text), strict=True) if not c.isspace()] == [
        n for n, c in zip(nudged, "".join(text), strict=True) if not c.isspace()
    ]


def test_adjacent_pieces_of_one_author_share_a_mark_without_outer_white_space():
    pieces = [Piece(" We", True), Piece(" can", True), Piece(" ", True), Piece("go", False), Piece("\n", True)]
    assert page.render([page.MarkedAnswer("q", pieces)], 0.4).count(" <mark>We can</mark> go\n</div>") == 1


@given(PIECES, st.floats(0, 1))
def test_each_visible_piece_shows_the_base_s_probability(pieces, threshold):
    reader = Reader(page.render([page.MarkedAnswer("q", pieces)], threshold))
    known = [piece.top1 for piece in pieces if piece.top1 is not None and piece.text.strip()]
    assert reader.tips == [f"{top1:.3f} {'<' if top1 < threshold else '≥'} γ" for top1 in known]
    assert all(attributes.get("tabindex") == "0" for _, attributes in reader.tags if "data-tip" in attributes)


def test_a_page_without_a_threshold_shows_no_comparison():
    answers = [page.MarkedAnswer("q", [Piece("Well", True, 0.25)])]
    assert Reader(page.render(answers, None)).tips == ["0.250"]
    assert "γ" not in page.render(answers, None) and "below γ = 0.4" in page.render(answers, 0.4)


@given(ANSWERS)
def test_the_page_loads_and_runs_nothing(answers):
    html = page.render(answers, 0.4)
    reader = Reader(html)
    assert {tag for tag, _ in reader.tags} <= set(
        "html head meta title style body header h1 h2 p mark main article div span dl dt dd".split()
    )
    assert not any({"src", "href", "style"} & set(attributes) for _, attributes in reader.tags)
    assert ("meta", "default-src 'none'; style-src 'unsafe-inline'") in [
        (tag, attributes.get("content")) for tag, attributes in reader.tags
    ]
    assert "url(" not in page._STYLE and "@import" not in page._STYLE


def test_the_figures_are_counted_from_the_pieces():
    one = page.MarkedAnswer(
        "q", [Piece("So", True), Piece(" it is", False), Piece(" 4", False)], {"given": "4: right"}
    )
    reader = Reader(page.render([one], 0.25))
    assert reader.figures == ["nudged words", "1 of 4 (25%)", "given", "4: right"]
    html = page.render([one, page.MarkedAnswer("r", [])], 0.25)
    assert "γ = 0.25" in html and "2 answers, 1 of 4 (25%) words nudged." in html


def luminance(colour):
    """The relative luminance of a colour, as WCAG 2 defines it."""
    colour = colour * 2 if len(colour) == 3 else colour
    linear = []
    for i in (0, 2, 4):
        value = int(colour[i : i + 2], 16) / 255
        linear.append(value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4)
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("dark", [False, True])
def test_text_can_be_read_in_both_modes(dark):
    colours = dict(re.findall(r"--(\w+): #(\w+)", page._STYLE.split("@media (prefers-color-scheme: dark)")[dark]))

    def contrast(a, b):
        dim, bright = sorted(luminance(colours[name]) for name in (a, b))
        return (bright + 0.05) / (dim + 0.05)

    assert all(contrast("ink", ground) >= 7 for ground in ("paper", "mark", "panel"))
    assert contrast("faint", "paper") >= 4.5 and contrast("under", "paper") >= 3


def test_a_page_is_written_as_it_is_rendered(tmp_path):
    answers = [page.MarkedAnswer("q\r\n\U0001f600", [Piece("caf\u00e9", True, 0.2)])]
    page.write(tmp_path / "out.html", answers, 0.4)
    assert (tmp_path / "out.html").read_bytes() == page.render(answers, 0.4).encode()
