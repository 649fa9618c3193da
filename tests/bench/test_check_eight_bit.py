"""`tools/check_eight_bit.py` in Triton's interpreter: what is right passes, and what is wrong is found."""

from __future__ import annotations

import json
import sys

import pytest
import torch

import check_eight_bit
from gac_kernels.common.triton import INTERPRETED
from timm_gac.bench import eight_bit

pytestmark = pytest.mark.skipif(not INTERPRETED or torch.cuda.is_available(), reason="needs Triton's interpreter")


def run(monkeypatch, path, *only: str) -> tuple[int, dict]:
    words = ("--model", "test_gac_msresnet", "--image-size", "8", "--num-steps", "2", "--check-batch", "2")
    monkeypatch.setattr(sys, "argv", ["", *words, "--parts", "check", "--only", ",".join(only), "--json", str(path)])
    return check_eight_bit.main(), json.loads(path.read_text())["checks"]


def test_all_kernels_pass_on_a_shape(monkeypatch, tmp_path):
    failed, rows = run(monkeypatch, tmp_path / "found.json", "24-32@8x8:s2")
    assert not failed and len(rows) == 10 and {name.split()[0] for name in rows} == set(eight_bit.KERNELS)
    assert 0.01 < rows["norm_bwd 24-32@8x8:s2 plain"]["errors"]["error"] < 0.04  # e4m3 has 3 bits behind the point


def test_what_is_wrong_is_found(monkeypatch, tmp_path):
    turn = eight_bit.turn
    monkeypatch.setattr(eight_bit, "turn", lambda x, steps: turn(x, steps).roll(1, -1))
    failed, rows = run(monkeypatch, tmp_path / "found.json", "norm_fwd 32-48@4x4:s2 plain", "weights 48")
    assert failed and rows["norm_fwd 32-48@4x4:s2 plain"]["wrong"] == "turned spikes differ"
    assert not rows["weights 48-48@2x2"]["wrong"]


def plain(monkeypatch, path) -> tuple[int, dict]:
    words = ("--model", "test_gac_msresnet", "--image-size", "8", "--num-steps", "2", "--batch", "2")
    monkeypatch.setattr(sys, "argv", ["", *words, "--parts", "plain", "--json", str(path)])
    monkeypatch.setattr(check_eight_bit, "STEPS", 1)
    monkeypatch.setattr(check_eight_bit, "ROUNDS", 1)
    return check_eight_bit.main(), json.loads(path.read_text())["plain"]


def test_plain_loops_are_compared_by_their_bits_and_timed(monkeypatch, tmp_path):
    failed, found = plain(monkeypatch, tmp_path / "found.json")
    assert not failed and not found["wrong"] and found["tensors"] > 50
    assert all(found[name]["images_per_s"] > 0 for name in ("16 bits", "8 bits by Triton", "8 bits"))


@pytest.mark.parametrize(("bad_run", "said"), [(2, "do not repeat"), (3, "1 of")])
def test_another_bit_of_a_plain_loop_is_found(bad_run, said, monkeypatch, tmp_path):
    runs, steps_bits = [], check_eight_bit.steps_bits

    def changed(args):
        runs.append(runs[0] if runs else steps_bits(args))
        found = dict(runs[0])
        name = next(name for name in found if name.startswith("gradient at layer"))
        if len(runs) == bad_run:
            found[name] = torch.nextafter(found[name], torch.full_like(found[name], torch.inf))
        return found

    monkeypatch.setattr(check_eight_bit, "steps_bits", changed)
    failed, found = plain(monkeypatch, tmp_path / "found.json")
    assert failed and said in found["wrong"] and "gradient at layer" in found["wrong"]
