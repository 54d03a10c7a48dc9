"""The algorithm on scripted models: answers are strings, a token is a string, and both models are dictionaries."""

import pytest

from nudging_hf.core.rounds import Accept, Lookahead, Question, Verdict, Word, rounds

EOS = "</s>"


def words(text: str) -> tuple[Word, ...]:
    """Words of a text in which every letter is a token."""
    pieces = text.split("|") if text else []
    return tuple(Word(piece, tuple(map(ord, piece))) for piece in pieces)


def run(lookaheads, verdicts, on_agreement=True, steps=60):
    """Plays the algorithm: `lookaheads` and `verdicts` map the text so far to an answer. Returns text, log, reason."""
    algorithm = rounds(on_agreement)
    text, log, reply = "", [], None
    for _ in range(steps):
        try:
            step = algorithm.send(reply)
        except StopIteration as end:
            return text, log, end.value
        reply = None
        if isinstance(step, Accept):
            piece = "".join(map(chr, step.ids))
            text += piece
            log.append((piece, "nudging" if step.nudged else "base"))
        elif step is Question.LOOKAHEAD:
            log.append("lookahead")
            written = lookaheads[text]
            reply = Lookahead(words(written.removesuffix(EOS)), written.endswith(EOS))
        else:
            log.append("verdict")
            token, top1, *inside = verdicts[text]
            spelt = "" if token == EOS else token
            reply = Verdict(ord(token) if spelt else 0, spelt, top1 >= 0.5, token == EOS, bool(inside))
    return text, log, "cut"


def test_the_nudging_model_writes_first_and_ends():
    assert run({"": "The| end." + EOS}, {}) == (
        "The end.",
        ["lookahead", ("The", "nudging"), (" end.", "nudging")],
        "eos",
    )


def test_an_empty_answer():
    assert run({"": EOS}, {})[::2] == ("", "eos")


def test_the_first_word_is_accepted_unasked_and_a_confident_base_takes_over():
    text, log, _ = run({"": "A| b| c", "Axy": EOS}, {"A": ("x", 0.9), "Ax": ("y", 0.5), "Axy": ("z", 0.49)})
    assert text == "Axy"
    assert log == [
        "lookahead",
        ("A", "nudging"),
        "verdict",
        ("x", "base"),
        "verdict",
        ("y", "base"),
        "verdict",
        "lookahead",
    ]


def test_agreement_takes_over_where_the_base_is_unsure():
    script = {"": "A| b| c", "A ": EOS, "A b": EOS}, {"A": (" ", 0.1), "A ": ("z", 0.1), "A b": ("z", 0.1)}
    assert run(*script)[1][:4] == ["lookahead", ("A", "nudging"), "verdict", (" ", "base")]
    assert run(*script, on_agreement=False)[1][:4] == ["lookahead", ("A", "nudging"), "verdict", (" b", "nudging")]


def test_agreement_includes_the_space_before_a_word():
    """Here the base would continue the word before, or begin a word after two spaces."""
    for token in ("b", "  b"):
        algorithm = rounds(True)
        algorithm.send(None)
        algorithm.send(Lookahead(words("A| b| c"), False))
        algorithm.send(None)
        assert algorithm.send(Verdict(7, token, False, False, False)) == Accept((32, 98), True)


@pytest.mark.parametrize(
    ("token", "agrees"),
    [("北", True), ("北京", True), ("北京大", True), ("北京大学", False), ("京", False), ("我", False)],
)
def test_a_longer_token_agrees_if_it_begins_the_rest_of_the_lookahead(token, agrees):
    """Words may be single characters, of which the base's tokens hold several. What was not written agrees never."""
    for beyond_word in (False, True):
        algorithm = rounds(True, beyond_word)
        algorithm.send(None)
        algorithm.send(Lookahead(words("我|北|京|大"), False))
        algorithm.send(None)
        accepted = algorithm.send(Verdict(7, token, False, False, False))
        takes_over = agrees and (beyond_word or token == "北")
        assert accepted == (Accept((7,), False) if takes_over else Accept((ord("北"),), True))


def test_the_last_word_is_asked_about_and_never_accepted():
    text, log, _ = run({"": "A| b", "A": EOS}, {"A": ("z", 0.1)})
    assert (text, log) == ("A", ["lookahead", ("A", "nudging"), "verdict", "lookahead"])


def test_a_single_word_is_taken_whole_and_a_fresh_round_begins():
    assert run({"": "Aha", "Aha": "!" + EOS}, {}) == (
        "Aha!",
        ["lookahead", ("Aha", "nudging"), "lookahead", ("!", "nudging")],
        "eos",
    )


def test_nobody_asks_about_an_empty_last_word():
    assert run({"": "A| b| ", "A b": EOS}, {"A": ("z", 0.1)})[1] == [
        "lookahead", ("A", "nudging"), "verdict", (" b", "nudging"), "lookahead",
    ]  # fmt: skip


def test_a_base_that_would_end_begins_a_fresh_round():
    """However sure it is: only the nudging model ends an answer."""
    assert run({"": "A| b| c", "A": " b" + EOS}, {"A": (EOS, 1.0)})[:2] == (
        "A b",
        ["lookahead", ("A", "nudging"), "verdict", "lookahead", (" b", "nudging")],
    )
    assert run({"": "A| b", "Ax": EOS}, {"A": ("x", 1.0), "Ax": (EOS, 1.0)})[1][-2:] == ["verdict", "lookahead"]


def test_inside_a_character_an_unsure_base_goes_on():
    verdicts = {"A": ("x", 0.9), "Ax": ("y", 0.1, "inside"), "Axy": ("z", 0.1)}
    assert run({"": "A| b", "Axy": EOS}, verdicts)[0] == "Axy"


def test_inside_a_character_a_base_that_would_end_does_not_go_on():
    verdicts = {"A": ("x", 0.9), "Ax": (EOS, 0.9, "inside")}
    assert run({"": "A| b", "Ax": EOS}, verdicts)[::2] == ("Ax", "eos")


def test_a_token_without_text_does_not_agree():
    algorithm = rounds(True)
    assert algorithm.send(None) is Question.LOOKAHEAD
    assert algorithm.send(Lookahead(words("A| b| c"), False)) == Accept((65,), True)
    assert algorithm.send(None) is Question.VERDICT
    assert algorithm.send(Verdict(7, "", False, False, False)) == Accept((32, 98), True)


def test_where_the_base_can_read_no_word_it_goes_on_itself():
    def answers(verdict):
        algorithm = rounds(True)
        algorithm.send(None)
        assert algorithm.send(Lookahead((), False)) is Question.VERDICT
        return algorithm.send(verdict)

    assert answers(Verdict(7, "x", False, False, False)) == Accept((7,), False)
    with pytest.raises(StopIteration) as end:
        answers(Verdict(0, "", True, True, False))
    assert end.value.value == "stuck"
