"""A short, seeded part of the damaged model folders of fuzz_folders.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from fuzz_folders import KINDS, run
from timm_gac.hub.facts import read_json


def test_damaged_folders_are_loaded_or_refused_by_a_sentence(tmp_path: Path) -> None:
    outcomes, failures = run(4 * len(KINDS), 2, tmp_path)
    assert failures == []
    assert sum(number for name, number in outcomes.items() if name.endswith("refused")) > len(KINDS)
    assert sum(number for name, number in outcomes.items() if name.endswith("passed")) > 0


def test_half_a_surrogate_pair_is_refused(tmp_path: Path) -> None:
    """JSON can spell what UTF-8 cannot, so that a card could not be written."""
    (tmp_path / "eval.json").write_text('{"dataset": "\\ud800"}', encoding="utf-8")
    with pytest.raises(ValueError, match=r"expected '.*eval\.json' as a JSON object, got .*surrogates"):
        read_json(tmp_path / "eval.json")
