import pytest
import torch

from nudging_hf.drafting import DraftLength


@pytest.fixture(autouse=True)
def _repeatable():
    torch.set_num_threads(1)  # Tiny models are slower on more.
    torch.manual_seed(0)


@pytest.fixture
def drafts_of_four(monkeypatch):
    """Adaptive drafts are of four tokens: how many passes there are depends on no clock."""
    monkeypatch.setattr(DraftLength, "choose", lambda self, rows: 4)
