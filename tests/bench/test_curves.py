"""The comparison of loss curves: what it calls equal, and that it trains both backends."""

import csv

import pytest
import torch

from timm_gac.bench import curves as bench_curves
from timm_gac.bench.curves import CurveConfig, compare_curves, share_within, smooth


def test_share_within_counts_steps_outside_of_the_span():
    eager = torch.tensor([[1.0, 1.0, 1.0, 1.0], [2.0, 2.0, 2.0, 2.0]])
    fused = torch.tensor([[1.0, 1.5, 2.4, 0.5], [2.0, 1.5, 2.6, 0.5]])  # means 1.5, 1.5, 2.5, 0.5; margin 0.15
    assert share_within(fused, eager) == 0.5
    assert torch.equal(smooth([[1.0, 3.0, 5.0]], 2), torch.tensor([[2.0, 4.0]]))


def test_trains_both_and_writes(tmp_path):
    pytest.importorskip("sklearn")
    files = dict(csv=tmp_path / "curves.csv", png=tmp_path / "curves.png")
    config = CurveConfig(
        model="test_gac_msresnet",
        image_size=8,
        steps=30,
        batch=16,
        window=10,
        seeds=(0, 1),
        precision="float32",
        fused="auto",
        device="cpu",
        **files,
    )
    assert compare_curves(config) == 1.0  # on a CPU both are plain PyTorch, so the curves are the same
    rows = list(csv.DictReader(files["csv"].open()))
    losses = {(r["curve"], r["seed"]): [float(x["loss"]) for x in rows if x["curve"] == r["curve"]] for r in rows}
    assert len(rows) == 120 and losses["fused", "0"] == losses["eager", "0"]
    first = [float(r["loss"]) for r in rows[:30]]
    assert sum(first[-10:]) < 0.8 * sum(first[:10])  # it learns
    assert files["png"].stat().st_size > 1000


def test_bad_config_is_a_sentence():
    with pytest.raises(ValueError, match="two seeds"):
        CurveConfig(seeds=(1, 1))
    with pytest.raises(ValueError, match="window"):
        CurveConfig(steps=5)
    with pytest.raises(ValueError, match="precision"):
        CurveConfig(precision="float16")
    assert bench_curves.CurveConfig().steps == 300
