"""The paired bootstrap: against the variance that theory gives, and refused where runs are not paired."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from timm_gac.analysis.bootstrap import paired_bootstrap
from timm_gac.cli.main import main


def test_interval_is_that_of_theory_for_one_seed() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.random((1, 4000)) < 0.8, rng.random((1, 4000)) < 0.77
    found = paired_bootstrap(a, b, draws=2000)
    difference = a[0].astype(int) - b[0]
    error = difference.std() / np.sqrt(4000)
    assert found.gain == pytest.approx(difference.mean())
    assert found.low == pytest.approx(found.gain - 1.96 * error, abs=0.2 * error)
    assert found.high == pytest.approx(found.gain + 1.96 * error, abs=0.2 * error)
    assert found.not_above < 0.05


def test_seeds_widen_it_and_equal_runs_gain_nothing() -> None:
    right = np.zeros((3, 1000), bool)
    for seed, count in enumerate((600, 700, 800)):
        right[seed, :count] = True
    base = np.zeros((3, 1000), bool)
    base[:, :690] = True
    found = paired_bootstrap(right, base, draws=2000)
    alone = paired_bootstrap(right[1:2], base[1:2], draws=2000)
    assert found.gain == pytest.approx(0.01) and found.low < -0.05 < 0.05 < found.high
    assert found.high - found.low > 3 * (alone.high - alone.low)
    same = paired_bootstrap(right, right, draws=50)
    assert (same.gain, same.low, same.high, same.not_above) == (0, 0, 0, 1)


def test_runs_that_are_not_paired_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match=r"of one shape, got \(2, 5\) and \(1, 5\)"):
        paired_bootstrap(np.ones((2, 5)), np.ones((1, 5)))
    answers = np.array([[0, 1], [1, 1], [2, 0], [1, 2]])
    for name, labels in (("a", [1, 1, 0, 2]), ("b", [1, 1, 1, 1]), ("c", [1, 1, 0, 2])):
        np.savez(tmp_path / f"{name}.npz", labels=np.array(labels), answers=answers if name != "c" else answers[::-1])
    files = {name: str(tmp_path / f"{name}.npz") for name in "abc"}
    assert main(["gain", files["a"], "--against", files["b"]]) == 2
    assert "the same images in every file" in capsys.readouterr().err
    assert main(["gain", files["a"], "--against", files["a"], files["c"]]) == 2
    (tmp_path / "half.npz").write_bytes((tmp_path / "a.npz").read_bytes()[:100])
    assert main(["gain", files["a"], "--against", str(tmp_path / "half.npz")]) == 2
    assert "expected a file of `timm-gac eval --answers`, got" in capsys.readouterr().err
    assert main(["gain", files["a"], "--against", files["c"], "--draws", "100"]) == 0
    shown = capsys.readouterr().out
    assert "mean 100.00%" in shown and "gain     +100.00 points, 95 % interval +100.00 to +100.00 points" in shown
    assert "over 4 images; in 0.0% of 100 resamples no gain" in " ".join(shown.split())
    assert "agree    0.00% of the answers" in shown


@pytest.mark.parametrize("shape", [(4,), (4, 0), (3, 2), (0, 2)])
def test_files_of_other_shapes_are_refused(
    shape: tuple[int, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = str(tmp_path / "odd.npz")
    np.savez(file, labels=np.zeros(0 if 0 in shape[:1] else 4, int), answers=np.zeros(shape, int))
    assert main(["gain", file, "--against", file]) == 2
    assert "not (N,) and (N, T)" in " ".join(capsys.readouterr().err.split())


def test_equal_answers_get_no_verdict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answers = np.array([[0, 1], [1, 1], [2, 0], [1, 2]])
    for name, steps in (("a", answers), ("b", answers[:, -1:])):  # what counts is the answer after the last step
        np.savez(tmp_path / f"{name}.npz", labels=np.array([1, 1, 0, 0]), answers=steps)
    a, b = str(tmp_path / "a.npz"), str(tmp_path / "b.npz")
    assert main(["gain", a, a, "--against", a, b]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert shown.count("mean 75.00%, standard deviation 0.00 points") == 2
    assert shown.endswith("gain none: the files of each pair have the same answers, over 2 seeds and 4 images")
