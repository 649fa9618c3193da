"""The model benchmark on the CPU: its gate, its rows and the files it writes."""

from __future__ import annotations

import csv
import json
import logging
import math
import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from gac_kernels import CIFAR
from timm_gac.bench import check as bench_check
from timm_gac.bench import model as bench_model
from timm_gac.bench import networks as bench_networks
from timm_gac.bench import session as bench_session
from timm_gac.bench import steps as bench_steps
from timm_gac.bench.baselines import LoopNeuron, TimeMajorNet
from timm_gac.bench.harness import time_limit
from timm_gac.bench.model import COLUMNS, ModelBenchConfig
from timm_gac.bench.networks import NETWORKS, ConvolutionsOnly
from timm_gac.bench.profile import KINDS, kind_of
from tiny_bench import TINY, prepared


def test_rows_and_their_arithmetic() -> None:
    rows, profiles = bench_model.bench_model(TINY)
    assert profiles == []
    assert [tuple(row) for row in rows] == [COLUMNS] * len(rows)
    assert [(row["mode"], row["provider"]) for row in rows] == [(m, p) for m in TINY.modes for p in TINY.providers]
    floors = {row["mode"]: row["images_per_s"] for row in rows if row["provider"] == "convolutions"}
    for row in rows:
        assert row["status"] == "ok", row["note"]
        assert row["batch"] == {"train": 4, "infer": 3}[row["mode"]] and row["num_steps"] == 2
        assert row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]
        assert row["images_per_s"] == pytest.approx(1e3 * row["batch"] / row["median_ms"])
        assert row["roofline_fraction"] == pytest.approx(row["images_per_s"] / floors[row["mode"]])
        assert (row["repetitions"], row["steps_per_block"]) == (3, 1)
        assert row["memory_format"] == "channels_last" and row["threads"] == torch.get_num_threads()
        assert row["peak_gib"] is None  # nothing counts it on a CPU
    assert bench_model.exit_code(rows) == 0


@pytest.mark.parametrize(
    ("modes", "batch", "limit", "said"),
    [
        (
            ("train", "infer"),
            3,
            120.0,
            "take minutes, and is given up after 120 s; quick is: --modes infer --infer-batch 16",
        ),
        (("infer",), 17, 0.0, "take minutes; quick is: --modes infer --infer-batch 16"),
        (("infer",), 16, 120.0, ""),
    ],
)
def test_a_cpu_is_told_what_is_quick(
    modes: tuple[str, ...], batch: int, limit: float, said: str,
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.setattr(bench_model, "_measure", lambda config, results: None)
    bench_model.bench_model(replace(TINY, modes=modes, infer_batch=batch, provider_limit_s=limit))
    assert said in caplog.text if said else not caplog.text


def test_providers_that_cannot_take_part_say_why() -> None:
    providers = ("timm_gac+graph", "published", "timm_gac_fused")
    rows, _ = bench_model.bench_model(replace(TINY, modes=("train",), providers=providers))
    assert [row["status"] for row in rows] == ["skipped"] * 3
    reasons = ("CUDA device", "no test_gac_msresnet", "inference only")
    for row, reason in zip(rows, reasons, strict=True):
        assert reason in row["note"] and row["median_ms"] is None and row["roofline_fraction"] is None
    assert bench_model.exit_code(rows) == 0


@pytest.mark.parametrize("network", ["timm_gac_plif", "spikingjelly_plif"])
def test_a_learned_decay_that_begins_elsewhere_fails_the_check(network: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if network == "spikingjelly_plif":
        pytest.importorskip("spikingjelly")
    build = NETWORKS[network]

    def other(*args: Any) -> nn.Module:
        built = build(*args)
        for key, value in built.named_parameters():
            if key.endswith((".w", "decay_logit")):
                nn.init.constant_(value, -1.0)
        return built

    monkeypatch.setitem(NETWORKS, network, other)
    rows, _ = bench_model.bench_model(replace(TINY, modes=("train",), providers=(network,)))
    assert [row["status"] for row in rows] == ["failed check"]


def test_gate_passes_training_in_every_precision_of_a_cpu() -> None:
    model, images = prepared("test_gac_msresnet", 16)
    reference = TimeMajorNet(model, LoopNeuron(model.spec))
    for precision in ("float32", "bfloat16"):
        for train in (True, False):
            assert bench_check.check_parts(model, reference, images, precision, train=train) == ""
    assert model.training  # and leaves the model as it was
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (replace(CIFAR, decay=0.25), "logits in float64"),
        (replace(CIFAR, threshold=1.1), "logits in float64"),
        (replace(CIFAR, detach_reset=True), "gradients of"),
        (replace(CIFAR, width=2.0), "gradients of"),
    ],
    ids=("decay", "threshold", "reset", "surrogate"),
)
def test_gate_refuses_a_wrong_baseline(monkeypatch: pytest.MonkeyPatch, spec: object, reason: str) -> None:
    monkeypatch.setitem(NETWORKS, "loop", lambda model, name, mode: TimeMajorNet(model, LoopNeuron(spec)))
    rows, _ = bench_model.bench_model(replace(TINY, modes=("train",), precisions=("bfloat16",), providers=("loop",)))
    assert [row["status"] for row in rows] == ["failed check"]
    assert reason in rows[0]["note"] and rows[0]["images_per_s"] is None
    assert bench_model.exit_code(rows) == 0  # a baseline's failure is a result; our own is not


@pytest.mark.parametrize(("change", "status"), [("weights", "failed check"), ("raise", "error")])
def test_our_own_failure_is_the_exit_status(monkeypatch: pytest.MonkeyPatch, change: str, status: str) -> None:
    ours = NETWORKS["timm_gac"]

    def broken(model: nn.Module, name: str, mode: str) -> nn.Module:
        if change == "raise":
            raise RuntimeError("no kernel\nsecond line")
        network = ours(model, name, mode)
        with torch.no_grad():
            network.layer2[0].conv2.weight.mul_(1.1)
        return network

    monkeypatch.setitem(NETWORKS, "timm_gac", broken)
    rows, _ = bench_model.bench_model(replace(TINY, modes=("infer",), providers=("timm_gac", "convolutions")))
    assert [row["status"] for row in rows] == [status, "ok"]
    assert "\n" not in rows[0]["note"] and (status != "error" or rows[0]["note"] == "RuntimeError: no kernel")
    assert bench_model.exit_code(rows) == 1
    assert bench_model.show_results(rows, []) == 1


def test_a_result_that_is_not_finite_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def infinite(model: nn.Module, name: str, mode: str) -> nn.Module:
        network = ConvolutionsOnly(model)
        nn.init.constant_(network.fc.bias, math.inf)
        return network

    monkeypatch.setitem(NETWORKS, "convolutions", infinite)
    rows, _ = bench_model.bench_model(replace(TINY, modes=("infer",), providers=("convolutions",)))
    assert rows[0]["status"] == "error" and "finite" in rows[0]["note"]


def test_training_steps_train_in_every_precision() -> None:
    model, images = prepared("test_gac_msresnet", 8, num_classes=5)
    for precision in ("float32", "bfloat16"):
        before = {name: parameter.clone() for name, parameter in model.named_parameters()}
        step = bench_steps.make_step(model, "train", precision, torch.device("cpu"), compiled=False)
        loss = step(images, torch.tensor([0, 1, 2, 3]))
        assert loss.dtype == torch.float32 and 0 < loss.item() < 10
        dead = [name for name, parameter in model.named_parameters() if not parameter.grad.abs().sum() > 0]
        assert all(name.startswith("encoder.temporal") for name in dead)  # its ReLU may be off
        moved = [name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])]
        assert "fc.bias" in moved and "layer1.0.conv1.weight" in moved


def test_compiled_providers_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[tuple[str, object]] = []

    def compile_nothing(network: nn.Module, **options: object) -> nn.Module:
        compiled.append((type(network).__name__, options["options"]))
        return network

    monkeypatch.setattr(torch, "compile", compile_nothing)
    providers = ("timm_gac", "timm_gac+compile", "loop+compile", "loop+compile_no_layout")
    bench_model.bench_model(replace(TINY, modes=("infer",), providers=providers))
    loops = [("TimeMajorNet", None), ("TimeMajorNet", {"layout_optimization": False})]
    assert compiled == [("SpikingResNet", None), *loops]


def test_files_append_with_provenance_and_refuse_another_kind(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "results.csv"
    profile_path = path.with_suffix(".profile.json")
    config = replace(TINY, modes=("infer",), num_steps=(1, 2), csv=path, png=tmp_path / "chart.png", profile=True)
    rows, profiles = bench_model.bench_model(config)
    first = path.read_text()
    bench_model.bench_model(config)
    assert path.read_text().startswith(first)
    with path.open(newline="") as file:
        written = list(csv.DictReader(file))
    assert len(written) == 2 * len(rows) == 12 and tuple(written[0]) == COLUMNS
    assert {(row["commit"], row["torch"], row["backend"]) for row in written} == {
        ("abc1234", torch.__version__, "eager")
    }
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")
    stored = json.loads(profile_path.read_text())
    assert len(stored) == 4 and stored[:2] == profiles
    for profile in stored:
        assert profile["commit"] == "abc1234" and profile["total_ms"] > 0
        assert sum(kind["ms"] for kind in profile["kinds"].values()) == pytest.approx(profile["total_ms"])
        assert {"convolution, forward", "encoder", "fused norm and LIF"} <= set(profile["kinds"])
    profile_path.write_text("{}")
    with pytest.raises(ValueError, match="JSON list"):
        bench_model.bench_model(config)
    path.write_text("model,accuracy\nx,1\n")
    with pytest.raises(ValueError, match=r"expected .* columns"):
        bench_model.bench_model(config)
    assert path.read_text() == "model,accuracy\nx,1\n" and profile_path.read_text() == "{}"


@pytest.mark.parametrize(
    ("operator", "kernel", "kind"),
    [
        ("aten::cudnn_convolution", "sm90_xmma_fprop_implicit_gemm_bf16", "convolution, forward"),
        ("aten::cudnn_convolution", "void cutlass::gemm_kernel", "convolution, forward"),
        ("aten::convolution_backward", "sm90_xmma_dgrad_implicit_gemm_bf16", "convolution, data gradient"),
        ("aten::convolution_backward", "cutlass_tensorop_wgrad_optimized", "convolution, weight gradient"),
        ("aten::convolution_backward", "void cutlass::gemm_kernel", "convolution, backward"),
        ("gac_kernels::lif", "_lif_fwd_kernel", "fused norm and LIF"),
        ("gac_kernels::gated_lif_backward", "_gated_bwd_kernel", "encoder"),
        ("gac_kernels::pool_frames_backward", "_pool_frames_backward_kernel", "encoder"),
        ("gac_kernels::firing_rate", "_firing_rate_kernel", "elementwise and reductions"),
        ("gac_kernels::gac_fire", "_fire_fwd_kernel", "encoder"),
        ("aten::_fused_sgd_", "void at::native::multi_tensor_apply_kernel", "optimizer"),
        ("aten::copy_", "void at::native::unrolled_elementwise_kernel", "copies and casts"),
        ("aten::add", "void at::native::vectorized_elementwise_kernel", "elementwise and reductions"),
        ("", "Memset (Device)", "copies and casts"),
        ("aten::unheard_of", "mystery", "other"),
    ],
)
def test_kinds_of_kernels(operator: str, kernel: str, kind: str) -> None:
    assert kind_of(operator, kernel) == kind
    assert kind in [*dict(KINDS), "other"]


def test_budget_and_limit_keep_what_was_measured(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def slow(model: nn.Module, name: str, mode: str) -> nn.Module:
        time.sleep(60)
        raise AssertionError("not stopped")

    monkeypatch.setitem(NETWORKS, "loop", slow)
    config = replace(TINY, modes=("infer",), providers=("loop", "convolutions"), provider_limit_s=4.0)
    started = time.perf_counter()
    rows, _ = bench_model.bench_model(config)
    assert [row["status"] for row in rows] == ["out of time", "ok"] and time.perf_counter() - started < 30
    with caplog.at_level(logging.WARNING):
        assert bench_model.bench_model(replace(config, time_budget_s=1e-9)) == ([], [])
    assert "time budget spent" in caplog.text


def test_time_limit_leaves_no_alarm_behind() -> None:
    with time_limit(0.05):
        pass
    time.sleep(0.1)
    with pytest.raises(TimeoutError, match="not done within"), time_limit(0.05):
        time.sleep(5)


def test_defaults_put_compilers_last_and_fit_the_device() -> None:
    config = ModelBenchConfig(device="cuda")
    train, infer = config.cases()
    for case, missing in ((train, "timm_gac_fused"), (infer, "timm_gac_packed")):
        providers = config.providers_of(case)
        assert "timm_gac+graph" in providers and "spikingjelly+compile+graph" in providers
        assert "spikingjelly+compile_no_layout" in providers
        assert ("spikingjelly_memopt" in providers) == (case is train)
        assert not any(provider.startswith(missing) for provider in providers)
        compiling = ["compile" in provider for provider in providers]
        assert compiling == sorted(compiling)
        for provider in providers:
            replace(config, providers=(provider,))  # each can be asked for by its name
    assert (train.batch, infer.batch, train.image_size) == (128, 512, 32)
    assert not any("graph" in name for name in replace(config, device="cpu").providers_of(train))
    assert set(bench_networks.LAUNCHES) == set(NETWORKS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "resnet18"}, "expected a model of this package, got 'resnet18'"),
        ({"modes": ("test",)}, "expected modes out of"),
        ({"modes": ()}, "expected at least one of modes"),
        ({"precisions": ("int8",)}, "expected precisions out of"),
        ({"precisions": ("float16",)}, "expected float32 or bfloat16 on a CPU"),
        (
            {"providers": ("timm_gac+cudagraph",)},
            "expected a provider such as 'timm_gac.graph', got 'timm_gac.cudagraph'",
        ),
        ({"providers": ("pytorch",)}, "expected a provider"),
        ({"train_batch": 0}, "expected train_batch >= 1"),
        ({"num_steps": (4, 0)}, "expected num_steps >= 1"),
    ],
)
def test_wrong_options_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(TINY, **change)


def test_results_are_shown_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = dict(modes=("infer",), providers=("timm_gac",), num_steps=(1,), profile=True)
    config = replace(TINY, **options, csv=tmp_path / "results.csv")
    assert bench_model.show_results(*bench_model.bench_model(config)) == 0
    printed = capsys.readouterr().out
    for text in ("test_gac_msresnet, 8x8", "timm_gac", "float32", "convolution, forward", "share"):
        assert text in printed
    assert len((tmp_path / "results.csv").read_text().splitlines()) == 2
    assert bench_session.CHECK_BATCH > 1


def test_rows_of_two_runs_into_one_file_are_all_kept(tmp_path: Path) -> None:
    """One run rewrites its own rows, whose floor is known later, and nobody else's."""
    path, row = tmp_path / "rows.csv", dict.fromkeys(bench_model.COLUMNS)
    path.write_text(",".join(bench_model.COLUMNS) + "\n")
    ours, other = bench_model._GrowingTable(path), row | {"provider": "other"}
    rows = [row | {"provider": "a"}]
    ours.write(rows)
    rows = [rows[0] | {"roofline_fraction": 0.5}, row | {"provider": "b"}]
    ours.write(rows)
    bench_model.append_rows(path, bench_model.COLUMNS, [other])
    ours.write([*rows, row | {"provider": "c"}])
    with path.open(newline="") as stream:
        found = list(csv.DictReader(stream))
    assert [line["provider"] for line in found] == ["a", "b", "other", "c"] and found[0]["roofline_fraction"] == "0.5"


def test_a_run_that_is_cut_keeps_what_it_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cut(session, provider, limit_s, run=bench_model._bench_provider):
        if provider == "spikingjelly":
            assert config.csv.read_text().count("\n") == 3  # they are there already, were the process killed now
            os.kill(os.getpid(), signal.SIGTERM)
        return run(session, provider, limit_s)

    monkeypatch.setattr(bench_model, "_bench_provider", cut)
    config = ModelBenchConfig(
        model="test_gac_msresnet",
        modes=("infer",),
        precisions=("float32",),
        infer_batch=1,
        image_size=8,
        steps=1,
        providers=("convolutions", "timm_gac", "spikingjelly"),
        csv=tmp_path / "rows.csv",
        device="cpu",
    )
    with pytest.raises(SystemExit, match="143"):
        bench_model.bench_model(config)
    with config.csv.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["provider"] for row in rows] == ["convolutions", "timm_gac"]
    assert float(rows[1]["roofline_fraction"]) > 0
