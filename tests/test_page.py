"""Tests the page: it preserves any text, marks the nudged characters, and loads and runs nothing."""

import dataclasses
import re
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nudging_hf import html_page, page
from nudging_hf.provenance import Alternative, Piece

ODD = ["</script>", "</div>", "<!--", "]]>", "&amp;", "&#13;", '"', "'", "\r\n", "\n", " ", "\u2028", "\u202e", "\0",
       "\U0001f469\u200d\U0001f4bb", "{title}", "%s", "a"]  # fmt: skip
TEXT = st.one_of(st.text(), st.lists(st.sampled_from(ODD)).map("".join))
ALTERNATIVES = st.builds(Alternative, st.integers(0), TEXT, st.floats(0, 1), st.integers(1), st.none() | TEXT)
PIECES = st.lists(
    st.builds(Piece, TEXT.filter(bool), st.booleans(), st.none() | st.floats(0, 1), st.none() | ALTERNATIVES),
    max_size=8,
)
ANSWER = st.builds(page.MarkedAnswer, TEXT, PIECES | TEXT, st.dictionaries(TEXT, TEXT, max_size=2))


@st.composite
def _beside(draw):
    """Several answers to one prompt, by their titles."""
    answers = draw(st.dictionaries(TEXT, ANSWER, min_size=1, max_size=3))
    prompt = draw(TEXT)
    return {title: dataclasses.replace(answer, prompt=prompt) for title, answer in answers.items()}


ANSWERS = st.lists(ANSWER | _beside(), max_size=3)


STYLE = html_page.STYLE + page._STYLE
GROUNDS = ["paper", "panel", "mark", *(f"{kind}{level}" for kind in "un" for level in range(1, 5))]


class Reader(HTMLParser):
    """Reads the texts of a page, which of their characters are marked, and all tags and tips."""

    def __init__(self, html):
        super().__init__()
        self.texts = []  # For each element of class "text": its kind, its text, and which characters are in <mark>.
        self.figures, self.headings = [], []
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
        if tag == "h2":
            self.headings.append("")
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
        elif self._open and self._open[-1][0] == "h2":
            self.headings[-1] += data
        elif self._open and self._open[-1][0] == "title":
            self.title += data


@given(ANSWERS, TEXT)
def test_the_page_preserves_any_text(answers, title):
    reader = Reader(page.render(answers, 0.4, title))
    assert not reader._open and reader.title == title
    entries = [list(entry.values()) if isinstance(entry, dict) else [entry] for entry in answers]
    expected = []
    for entry in entries:
        expected.append(("prompt", entry[0].prompt))
        for answer in entry:
            whole = isinstance(answer.pieces, str)
            expected.append(("answer", answer.pieces if whole else "".join(piece.text for piece in answer.pieces)))
            for said in (said for pair in answer.figures.items() for said in pair):
                assert said in reader.figures
    assert [(kind, "".join(text)) for kind, text, _ in reader.texts] == expected
    for title in (title for entry in answers if isinstance(entry, dict) for title in entry):
        assert title in reader.headings


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
    assert [tip.split("\n")[0] for tip in reader.tips] == [f"{p:.3f} {'<' if p < threshold else '≥'} γ" for p in known]
    reached = [
        tag == "a" or attributes.get("tabindex") == "0" for tag, attributes in reader.tags if "data-tip" in attributes
    ]
    assert len(reached) == len(known) and all(reached)


def test_a_nudge_shows_what_the_base_would_have_written():
    nudge = Piece(" Well", True, 0.25, Alternative(3, " A\n", 0.2, 7))
    end = Piece(" So", True, 0.9, Alternative(4, "", 0.9, 2))
    reader = Reader(page.render([page.MarkedAnswer("q", [nudge, Piece(" it", False, 0.5), end])], 0.4))
    assert reader.tips == [
        "0.250 < γ\nthe base alone: “\u2068 A⏎\u2069” (0.200)\nrank of this token: 7",
        "0.500 ≥ γ",
        "0.900 ≥ γ\nthe base alone: no more text (0.900)\nrank of this token: 2",
    ]


def test_a_piece_is_the_darker_the_less_sure_the_base_was():
    pieces = [Piece("x", False, top1) for top1 in (1, 0.9, 0.89, 0.69, 0.49, 0.29, 0)]
    tags = Reader(page.render([page.MarkedAnswer("q", pieces)], None)).tags
    assert [each["class"] for _, each in tags if "data-tip" in each] == ["u0", "u0", "u1", "u2", "u3", "u4", "u4"]


def test_a_click_on_a_nudge_leads_to_what_the_base_alone_would_have_written():
    nudges = [
        Piece(text, True, 0.2, Alternative(0, " A", 0.2, 7, go)) for text, go in ((" Well", " A <b>"), (" So", ""))
    ]
    pieces = [nudges[0], Piece("!", True, 0.1, Alternative(1, "?", 0.1, 2)), Piece(" it is", False, 0.5), nudges[1]]
    html = page.render([page.MarkedAnswer("q", pieces), page.MarkedAnswer("r", pieces)], 0.4)
    links = [each["href"] for tag, each in Reader(html).tags if tag == "a" and "data-tip" in each]
    targets = [each["id"] for tag, each in Reader(html).tags if tag == "aside"]
    assert len(set(targets)) == 4 and ["#" + each for each in targets] == list(dict.fromkeys(links))
    assert len(links) == 6  # Both pieces of the first nudge lead there.
    assert html.count("<span></span> A &lt;b&gt;</p>") == 2
    assert html.count("<span> Well! it is</span>(it ends the answer here)</p>") == 2
    assert "From “Well!” on" in html and "A click on a nudge" in html
    assert "A click" not in page.render([page.MarkedAnswer("q", [Piece("a", True, 0.2)])], 0.4)


def test_a_part_of_another_page_shows_the_same():
    answers = [
        {"base alone": page.MarkedAnswer("q", "<a>"), "nudged": page.MarkedAnswer("q", [Piece("b", True, 0.2)])}
    ]
    part = page.render_part(answers, 0.4)
    assert part in page.render(answers, 0.4) and part.startswith("<article>")
    assert page.style_within(".here").startswith(".here {") and page._STYLE in page.style_within(".here")


def test_only_answers_to_one_prompt_stand_beside_each_other():
    one, other = page.MarkedAnswer("q", "a"), page.MarkedAnswer("r", "b")
    assert "data-beside" in page.render([{"A": one, "B": dataclasses.replace(other, prompt="q")}], None)
    with pytest.raises(ValueError, match="have one prompt, got 2"):
        page.render([{"A": one, "B": other}], None)


def test_a_heading_says_why_a_prompt_is_shown():
    answers = [page.MarkedAnswer(each, "a") for each in "qrs"]
    headings = Reader(page.render(answers, None, headings=["The <best>", "The worst"])).headings
    assert headings == ["The <best>", "Answer", "The worst", "Answer", "Prompt", "Answer"]


def test_a_page_says_nothing_of_probabilities_that_its_answers_lack():
    plain = page.render([page.MarkedAnswer("q", [Piece("So", True), Piece(" it", False)])], 0.4)
    assert "Point at" not in plain and "How unsure" not in plain and "words like these" in plain
    assert "Point at" in page.render([page.MarkedAnswer("q", [Piece("So", True, 0.2)])], 0.4)


def test_a_page_without_a_threshold_shows_no_comparison():
    answers = [page.MarkedAnswer("q", [Piece("Well", True, 0.25)])]
    assert Reader(page.render(answers, None)).tips == ["0.250"]
    assert "γ" not in page.render(answers, None) and "below γ = 0.4" in page.render(answers, 0.4)


@given(ANSWERS)
def test_the_page_loads_and_runs_nothing(answers):
    html = page.render(answers, 0.4)
    reader = Reader(html)
    assert {tag for tag, _ in reader.tags} <= set(
        "html head meta title style body header h1 h2 p mark main article section aside a div span dl dt dd".split()
    )
    assert not any({"src", "style"} & set(attributes) for _, attributes in reader.tags)
    assert all(attributes.get("href", "#").startswith("#") for _, attributes in reader.tags)
    assert ("meta", "default-src 'none'; style-src 'unsafe-inline'") in [
        (tag, attributes.get("content")) for tag, attributes in reader.tags
    ]
    assert "url(" not in STYLE and "@import" not in STYLE


def test_the_figures_are_counted_from_the_pieces():
    one = page.MarkedAnswer(
        "q", [Piece("So", True, 0.2), Piece(" it is", False), Piece(" 4", False)], {"given": "4: right"}
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


COLOURS = re.findall(r"--(\w+): light-dark\(#(\w+), #(\w+)\)", html_page.COLOURS + page._COLOURS)


@pytest.mark.parametrize("dark", [False, True])
def test_text_can_be_read_in_both_modes(dark):
    colours = {name: both[dark] for name, *both in COLOURS}

    def contrast(a, b):
        dim, bright = sorted(luminance(colours[name]) for name in (a, b))
        return (bright + 0.05) / (dim + 0.05)

    assert all(contrast("ink", ground) >= 7 for ground in GROUNDS)
    assert all(contrast("faint", ground) >= 4.5 for ground in ("paper", "panel")) and contrast("under", "paper") >= 3


def test_a_page_is_written_as_it_is_rendered(tmp_path):
    answers = [page.MarkedAnswer("q\r\n\U0001f600", [Piece("caf\u00e9", True, 0.2)])]
    page.write(tmp_path / "out.html", answers, 0.4)
    assert (tmp_path / "out.html").read_bytes() == page.render(answers, 0.4).encode()
