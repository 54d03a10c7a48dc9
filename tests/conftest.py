import pytest
import torch

from nudging_hf.core.draft_policy import DraftLength, GuessLength, Plan


@pytest.fixture(autouse=True)
def _repeatable():
    torch.set_num_threads(1)  # Tiny models are slower on more.
    torch.manual_seed(0)


@pytest.fixture
def drafts_of_four(monkeypatch):
    """Adaptive drafts and guesses are of four tokens: how many passes there are depends on no clock."""
    monkeypatch.setattr(DraftLength, "choose", lambda self, rows, steps_are_free, reread: Plan(4, 4))
    monkeypatch.setattr(GuessLength, "choose", lambda self, rows: 4)
