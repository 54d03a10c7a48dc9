"""What stands in a terminal is what was written, with the nudging model's words marked."""

import io
import sys

from hypothesis import given
from hypothesis import strategies as st

from nudging_hf.provenance import Alternative, Piece
from nudging_hf.terminal import TerminalWriter, is_coloured, nudges_told


@given(st.lists(st.tuples(st.text(alphabet="ab \n", min_size=1, max_size=3), st.booleans())))
def test_ink_marks_exactly_what_was_nudged(pieces):
    out = io.StringIO()
    with TerminalWriter(out, coloured=False, marked=True) as ink:
        for text, nudged in pieces:
            ink.write(text, nudged)
    inside, marked = False, []
    for character in out.getvalue():
        if character in "⟦⟧":
            assert inside == (character == "⟧")
            inside = not inside
        elif not character.isspace():
            marked.append((character, inside))
    assert not inside
    assert marked == [(character, nudged) for text, nudged in pieces for character in text if not character.isspace()]
    plain = out.getvalue().replace("⟦", "").replace("⟧", "")
    assert plain.rstrip("\n") == "".join(text for text, _ in pieces).rstrip("\n")
    assert "⟦ " not in out.getvalue() and " ⟧" not in out.getvalue()


def shown(text, **how):
    out = io.StringIO()
    with TerminalWriter(out, **{"coloured": False, "marked": False, **how}) as ink:
        ink.write(text, False)
    return out.getvalue()


@given(st.text())
def test_a_pipe_is_given_the_text_as_it_is(text):
    assert shown(text) == text.rstrip("\n") + "\n"


@given(st.text(), st.sampled_from(["coloured", "marked"]))
def test_no_control_character_of_an_answer_reaches_a_terminal(text, how):
    out = shown(text, **{how: True})
    assert not [c for c in out if (ord(c) < 0x20 and c not in "\t\n") or 0x7F <= ord(c) < 0xA0]
    assert len(out.rstrip("\n")) == len(text.rstrip("\n"))


def test_control_characters_are_shown_by_their_pictures():
    assert shown("a\x1b[31m\r\x00\x7f\tb", marked=True) == "a\u241b[31m\u240d\u2400\u2421\tb\n"


def test_an_ink_is_ready_for_another_answer():
    out = io.StringIO()
    ink = TerminalWriter(out, coloured=False, marked=True)
    for _ in range(2):
        ink.write("Well ", True)
        ink.end()
    assert out.getvalue() == "\u27e6Well\u27e7 \n" * 2


def test_a_nudge_is_told_with_what_the_base_would_have_written():
    pieces = [
        Piece("So", False, 0.9),
        Piece(" we\n", True, 0.25, Alternative(1, " it", 0.2, 7)),
        Piece(" go", True, 0.2, Alternative(2, " x", 0.2, 3)),
        Piece(" on", False, 0.9),
        Piece("\x1b!", True, 0.9, Alternative(4, "", 0.9, 2)),
        Piece("?", True),
    ]
    heading, *told = nudges_told(pieces)
    assert heading.startswith("At each nudge, ") and told == [
        "⟦we⏎ go⟧ base: “it” (0.200); rank 7",
        "⟦␛!?⟧ base: no more text (0.900); rank 2",
    ]
    assert list(nudges_told(pieces[:1])) == ["There is no nudge to tell of, or the answer was broken off."]


def test_colour_is_for_terminals_that_want_it(monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert is_coloured() and not is_coloured("never")
    monkeypatch.setenv("NO_COLOR", "1")
    assert not is_coloured() and is_coloured("always")
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("TERM", "dumb")
    assert not is_coloured()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: False)
    assert not is_coloured()


def test_an_answer_cannot_forge_marks_or_turn_the_text_around():
    out = io.StringIO()
    with TerminalWriter(out, coloured=False, marked=True) as writer:
        writer.write("base ⟦not nudged⟧ \u202eback\u2066 ", False)
        writer.write("⟧nudged⟦", True)
    assert out.getvalue() == "base [not nudged] \ufffdback\ufffd ⟦]nudged[⟧\n"
