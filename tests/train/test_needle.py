"""examples/needle.py: what a model with 16 keys per row recalls from 256 tokens, by who chooses the keys."""

import importlib.util
from pathlib import Path


def test_a_trained_indexer_recalls_what_a_window_cannot():
    """Chance is 1/8, and a fresh indexer lists the needle in one of 16 cases. At 128 questions the standard deviation
    of either is below 0.04, so 0.35 is over 4 of them away.
    """
    spec = importlib.util.spec_from_file_location("needle", Path(__file__).parents[2] / "examples" / "needle.py")
    needle = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(needle)
    trained, window, untrained = needle.main().values()
    assert trained >= 0.95
    assert window <= 0.35
    assert untrained <= 0.35
