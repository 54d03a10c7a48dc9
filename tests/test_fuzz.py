"""The targets of `make fuzz` on some bytes, so that they hold without a fuzzer too."""

import pytest
from fuzz.targets import TARGETS
from hypothesis import given, settings
from hypothesis import strategies as st


@pytest.mark.parametrize("name", TARGETS)
@settings(max_examples=100, deadline=None)
@given(data=st.binary(max_size=80))
def test_no_bytes_break_a_rule(name, data):
    TARGETS[name](data)
