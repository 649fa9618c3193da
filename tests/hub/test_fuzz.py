"""A short, seeded part of the damaged model folders of fuzz_folders.py."""

from __future__ import annotations

from pathlib import Path

from fuzz_folders import KINDS, run


def test_damaged_folders_are_loaded_or_refused_by_a_sentence(tmp_path: Path) -> None:
    outcomes, failures = run(4 * len(KINDS), 2, tmp_path)
    assert failures == []
    assert sum(number for name, number in outcomes.items() if name.endswith("refused")) > len(KINDS)
    assert sum(number for name, number in outcomes.items() if name.endswith("passed")) > 0
