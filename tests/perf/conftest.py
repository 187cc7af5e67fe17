"""A stand-in for DeepSpeed, where it is not installed."""

from importlib.util import find_spec
from pathlib import Path

import pytest

STAND_IN = Path(__file__).parent / "stand_in"


@pytest.fixture
def deepspeed(monkeypatch):
    if find_spec("deepspeed") is None:
        monkeypatch.syspath_prepend(STAND_IN)
