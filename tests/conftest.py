import pytest
import torch


@pytest.fixture(autouse=True)
def _repeatable():
    torch.set_num_threads(1)  # Tiny models are slower on more.
    torch.manual_seed(0)
