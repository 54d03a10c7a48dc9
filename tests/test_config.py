import pytest

from nudging_hf import NudgingConfig


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("nudge_threshold", "0.4"),
        ("nudge_threshold", float("nan")),
        ("nudge_threshold", float("inf")),
        ("nudge_threshold", -0.1),
        ("nudge_threshold", True),
        ("nudge_threshold", "automatic"),
        ("nudge_threshold", 10**400),
        ("nudge_threshold", [0.4]),
        ("nudge_gate", "top2"),
        ("nudge_gate", ["top1"]),
        ("nudge_gate", {}),
        ("target_nudge_rate", 0),
        ("target_nudge_rate", 1.0),
        ("target_nudge_rate", 10**400),
        ("target_nudge_rate", float("nan")),
        ("num_nudging_tokens", 0),
        ("num_nudging_tokens", 2.5),
        ("num_nudging_tokens", "16"),
        ("takeover_on_agreement", 1),
        ("word_boundary", "letters"),
        ("word_boundary", True),
        ("num_draft_tokens", -1),
        ("num_draft_tokens", "many"),
        ("num_draft_tokens", True),
    ],
)
def test_a_wrong_value_is_named(field, value):
    with pytest.raises(ValueError, match=f"`{field}`") as error:
        NudgingConfig(**{field: value})
    assert repr(value) in str(error.value)


def test_thresholds_above_one_are_allowed():
    assert NudgingConfig(nudge_threshold=1.01).nudge_threshold == 1.01


def test_the_first_source_that_sets_a_parameter_wins():
    config = NudgingConfig.resolve(
        [{"nudge_threshold": None}, {"nudge_threshold": 0.3, "num_draft_tokens": 0}, {"nudge_threshold": 0.9}, {}]
    )
    assert config == NudgingConfig(nudge_threshold=0.3, num_draft_tokens=0)


def test_a_calibrated_threshold_belongs_to_what_counted_as_a_word():
    stored = {"nudge_threshold": 0.3, "word_boundary": "unicode"}
    assert NudgingConfig.resolve([{"nudge_threshold": "auto"}, stored]).nudge_threshold == 0.3
    other = NudgingConfig.resolve([{"nudge_threshold": "auto", "word_boundary": "space"}, stored])
    assert other.nudge_threshold == "auto" and other.word_boundary == "space"


def test_a_config_cannot_be_changed():
    with pytest.raises(AttributeError):
        NudgingConfig().nudge_threshold = 0.5
