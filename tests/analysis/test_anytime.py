"""Answers at any step: the same figures as the evaluation and the energy meter, entropies by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import timm
import torch

from timm_gac import cli
from timm_gac.analysis.anytime import measure_anytime
from timm_gac.analysis.coding import entropy_bits, measure_coding
from timm_gac.analysis.evaluate import evaluate
from timm_gac.energy import measure_energy
from timm_gac.hub import calibrate, save_model_folder
from timm_gac.inference.early_exit import early_exit


def small(steps=4, batch=6, **kwargs):
    model = timm.create_model("test_gac_msresnet", num_steps=steps, num_classes=3, **kwargs)
    images = torch.randn(batch, 3, 16, 16)
    return calibrate(model, [images, images.flip(0)]), images


def test_one_pass_gives_the_figures_of_evaluation_and_meter():
    model, images = small(batch=8)
    labels = torch.arange(8) % 3
    with torch.no_grad():
        steps = model.forward_steps(images)
    some = (
        steps[:, 0].softmax(-1).amax(-1).median().item() + 1e-6
    )  # about half of the images are as sure after one step
    batches = [(images[:5], labels[:5]), (images[5:], labels[5:])]
    report = measure_anytime(model, batches, confidences=(0.01, some, 1.0))
    assert report.top1 == pytest.approx(evaluate(model, batches).top1_per_step)
    energy = measure_energy(model, [images])
    for convention, values in report.energy_mj.items():
        # The head runs on each step here and once on rates in `forward`: a thousandth of the network.
        assert values[-1] == pytest.approx(energy.totals()[convention]["energy_mj"], rel=2e-2)
        assert list(values) == sorted(values)
    first, middle, last = report.exits
    assert (first.mean_steps, first.top1) == (1.0, report.top1[0]) and first.shares == (1, 0, 0, 0)
    assert last.mean_steps == 4.0 and last.top1 == report.top1[-1]
    assert last.energy_mj == pytest.approx({name: values[-1] for name, values in report.energy_mj.items()})
    out = early_exit(steps, some)
    assert middle.mean_steps == pytest.approx(out.steps.double().mean().item()) and 1 < middle.mean_steps < 4
    assert middle.top1 == pytest.approx((out.logits.argmax(1) == labels).double().mean().item())
    spent = sum(report.energy_mj["strict"][step - 1] for step in out.steps.tolist()) / 8
    assert middle.energy_mj["strict"] == pytest.approx(spent)


def test_later_steps_do_not_change_an_earlier_answer():
    # What makes early exit honest: with a static image an answer after t steps needs nothing of the steps that follow.
    model, images = small(steps=4)
    twin = timm.create_model("test_gac_msresnet", num_steps=4, num_classes=3, encoder="direct").eval()
    with torch.no_grad():
        for network in (model, twin):
            whole = network.forward_steps(images)
            network.encoder.register_forward_hook(lambda _m, _i, output: torch.cat((output[:2], output[2:] * 7)))
            assert torch.equal(network.forward_steps(images)[:, :2], whole[:, :2])


def test_entropy_by_hand():
    assert entropy_bits(torch.zeros(1000, dtype=torch.long)) == 0
    even = torch.arange(4).repeat(1000)
    assert entropy_bits(even) == pytest.approx(2 + 3 / (2 * 4000 * math.log(2)))
    skewed = torch.tensor([0] * 6000 + [1] * 2000)
    plain = -(0.75 * math.log2(0.75) + 0.25 * math.log2(0.25))
    assert entropy_bits(skewed) == pytest.approx(plain + 1 / (2 * 8000 * math.log(2)))


def test_direct_coding_says_nothing_new_and_gac_does():
    images = torch.randn(16, 3, 16, 16)
    gac = calibrate(timm.create_model("test_gac_msresnet"), [images])
    direct = calibrate(timm.create_model("test_gac_msresnet", encoder="direct"), [images])
    ours, twin = (measure_coding(model, images.split(8), bins=8, samples_per_image=512) for model in (gac, direct))
    assert ours.samples == twin.samples == 16 * 512 and ours.images == 16
    assert twin.encoder.new[1:] == pytest.approx((0, 0, 0), abs=1e-9)
    assert twin.encoder.joint == pytest.approx((twin.encoder.entropy[0],) * 4)
    assert twin.encoder.shared_with_first == pytest.approx(twin.encoder.entropy, rel=1e-3)
    assert twin.encoder.about_input == pytest.approx((twin.input_entropy,) * 4)  # the input itself, at every step
    assert min(ours.encoder.new[1:3]) > 0.01 and ours.encoder.joint[-1] > ours.encoder.entropy[0] + 0.1
    for report in (ours, twin):
        for coding in (report.encoder, report.spikes):
            assert sum(coding.new) == pytest.approx(coding.joint[-1])
            assert max(coding.about_input) <= report.input_entropy + 1e-9
        assert max(report.spikes.entropy) <= 1 + 1e-3
    assert twin.spikes.new[1] > 0.01  # its neurons do change over time, though their input does not


def test_coding_measure_is_right_on_a_known_sequence():
    # A neuron at threshold 1 and decay 0.5: spikes of a constant input a are 1111, 0101, 0010, 0001... or 0000.
    model, images = small()
    report = measure_coding(model, [images], samples_per_image=10**9)
    stem = model.bn1(model.conv1(images)).detach()
    fired = (model.encoder(stem) != 0).flatten(1)
    codes = sum(fired[t].long() << t for t in range(4))
    spikes_of_gate = entropy_bits(codes)
    assert report.samples == stem.numel() and report.encoder.joint[-1] >= spikes_of_gate - 1e-9
    assert torch.unique(codes).numel() <= 6


def test_command_compares_two_networks(tmp_path: Path, capsys):
    pytest.importorskip("matplotlib", reason="draws with matplotlib")
    rng = np.random.default_rng(0)
    arrays = {f"x_{split}": rng.integers(0, 255, (36, 3, 32, 32), dtype=np.uint8) for split in ("train", "test")}
    arrays |= {f"y_{split}": np.arange(36) % 5 for split in ("train", "test")}
    np.savez(tmp_path / "set.npz", **arrays)
    out = tmp_path / "out"
    arguments = ["anytime", "test_gac_msresnet", "--data", str(tmp_path / "set.npz"), "--out", str(out)]
    assert cli.main([*arguments, "--against", "test_gac_msresnet", "--images", "10", "--precision", "bfloat16"]) == 0
    shown = capsys.readouterr().out
    assert "early exit" in shown and "10 images" in shown and "random (seed 0)" in shown
    content = json.loads((out / "anytime.json").read_text())
    assert len(content) == 2 and len(content[0]["top1_by_step"]) == 4 and content[0]["images"] == 10
    assert content[0]["energy_by_step_mj"] == content[1]["energy_by_step_mj"]
    assert "left out" in shown and "so far" not in shown and not (out / "coding.png").exists()
    assert cli.main([*arguments, "--overwrite"]) == 0  # 36 images are enough for entropies
    shown, (coding,) = (
        capsys.readouterr().out,
        [one["coding"] for one in json.loads((out / "anytime.json").read_text())],
    )
    (last,) = (line for line in shown.splitlines() if line.startswith("    4 "))
    assert last.split()[-2:] == [f"{coding['encoder'][key][-1]:.2f}" for key in ("joint", "new")]
    assert all((out / name).read_bytes()[:4] == b"\x89PNG" for name in ("anytime.png", "coding.png"))
    assert cli.main(arguments) == 2 and "--overwrite" in capsys.readouterr().err
    assert cli.main([*arguments[:4], "--confidences", "2"]) == 2


def test_a_network_without_an_estimate_of_energy_is_sent_to_eval(tmp_path, capsys) -> None:
    integer = timm.create_model("test_gac_msresnet", num_classes=10, in_chans=1, neuron="integer")
    folder = save_model_folder(integer, tmp_path / "model")
    assert cli.main(["anytime", str(folder), "--data", "digits"]) == 2
    assert "got those of neuron 'integer'" in (told := capsys.readouterr().err) and "timm-gac eval" in told
