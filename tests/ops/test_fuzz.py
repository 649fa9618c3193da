"""A short seeded part of the fuzz: each public op with good and bad calls; `fuzz.py` runs more by hand."""

from __future__ import annotations

import fuzz


def test_good_calls_match_and_bad_calls_are_refused() -> None:
    counts, failures = fuzz.run(count_good=160, count_bad=320, triton=10)
    assert not failures, "\n".join(failures)
    assert counts["good, Triton"] > 5 and counts["good, eager"] > 100
    assert sum(count for kind, count in counts.items() if kind.startswith("bad: ")) == 320
    assert counts["bad: right after all"] < 64


def test_a_wrong_answer_is_seen(monkeypatch) -> None:
    right = fuzz.gac_kernels.firing_rate
    monkeypatch.setattr(
        fuzz.gac_kernels, "firing_rate", lambda x, num_steps, dtype=None: right(x, num_steps, dtype) + 1
    )
    place = fuzz.OPS.index("firing_rate")
    assert any("relative error" in fuzz.good("firing_rate", seed) for seed in range(place, 100, 16))
