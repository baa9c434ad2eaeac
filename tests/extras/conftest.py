"""The tests of extras use the helpers of the core's tests, and weights keep their types on every CPU."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))


@pytest.fixture(autouse=True)
def units(monkeypatch):
    from extras import mixed_types

    monkeypatch.setattr(mixed_types, "has_units", lambda dtype: True)
    mixed_types.computed_in.cache_clear()
