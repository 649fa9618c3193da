"""The benchmark on the CPU: its byte counts, its gate, and the files it writes."""

from __future__ import annotations

import csv
import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from gac_kernels import CIFAR, IMAGENET, lif
from timm_gac.bench import harness as bench_harness
from timm_gac.bench import kernels as benchmark
from timm_gac.bench import ops as bench_ops
from timm_gac.bench.harness import fit_table, rows_table
from timm_gac.bench.kernels import COLUMNS, KernelBenchConfig, bench_kernels
from timm_gac.bench.ops import OPS, Case

CPU = torch.device("cpu")
TINY = KernelBenchConfig(
    ops=("lif", "gac_encode"),
    dtypes=("float32",),
    memory_formats=("channels_last",),
    num_steps=(3,),
    specs=("cifar",),
    size=3 * 2 * 3 * 5 * 7,
    frame=(3, 5, 7),
    baselines=False,
    target_ms=1.0,
    commit="abc1234",
    device="cpu",
)
NEURONS = 2 * 3 * 5 * 7  # B * C * H * W


def counted(op: str, spec: str, dtype: str = "float32", num_steps: int = 3) -> tuple[int, int]:
    case = Case(op=op, spec=spec, dtype=dtype, memory_format="contiguous", num_steps=num_steps)
    inputs = bench_ops.make_inputs(op=OPS[op], case=case, batch=2, frame=(3, 5, 7), device=CPU)
    output = torch.empty(num_steps, 2, 3, 5, 7, dtype=inputs[0].dtype)
    mask = bench_ops.mask_bytes(OPS[op], bench_ops.SPECS[spec], num_steps, NEURONS)
    return bench_ops.count_bytes(inputs, output, mask)


def test_byte_counts_by_hand() -> None:
    x = 3 * NEURONS * 4
    temporal = 2 * 3 * 4
    assert counted("lif", "cifar") == (2 * x, 5 * x)
    assert counted("lif", "cifar", "bfloat16") == (x, 5 * x // 2)
    assert counted("lif", "imagenet") == (2 * x, 4 * x + 2 * NEURONS)
    assert counted("lif", "imagenet", num_steps=6) == (4 * x, 8 * x + 4 * NEURONS)
    frame = NEURONS * 4
    assert counted("gac_encode", "cifar") == (2 * frame + temporal + x, 6 * frame + 3 * temporal + 2 * x)
    assert counted("gated_lif", "imagenet") == (3 * x + temporal, 8 * x + 3 * temporal)


def test_rows_and_their_arithmetic() -> None:
    rows = bench_kernels(TINY)
    assert [tuple(row) for row in rows] == [COLUMNS] * len(rows)
    named = {(row["op"], row["direction"]): row for row in rows}
    assert list(named) == [
        ("copy", "start"),
        *((op, direction) for op in ("lif", "gac_encode") for direction in ("forward", "forward+backward")),
        ("copy", "end"),
    ]
    bandwidth = sum(named["copy", moment]["gb_per_s"] for moment in ("start", "end")) / 2
    for row in rows:
        assert row["status"] == "ok", row["note"]
        assert row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]
        assert row["gb_per_s"] == pytest.approx(row["bytes"] / row["median_ms"] / 1e6)
        assert row["copy_fraction"] == pytest.approx(row["gb_per_s"] / bandwidth)
    assert named["lif", "forward"]["bytes"] == 2 * 3 * NEURONS * 4
    assert named["lif", "forward"]["shape"] == "3x2x3x5x7"
    assert named["lif", "forward+backward"]["saved_bytes_per_step"] == 4
    assert benchmark.exit_code(rows) == 0


@pytest.mark.parametrize("op", list(OPS))
@pytest.mark.parametrize("spec", ["cifar", "imagenet"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("memory_format", ["contiguous", "channels_last"])
def test_gate_passes_every_op(op: str, spec: str, dtype: str, memory_format: str) -> None:
    case = Case(op=op, spec=spec, dtype=dtype, memory_format=memory_format, num_steps=4)
    inputs = bench_ops.make_inputs(op=OPS[op], case=case, batch=5, frame=(3, 5, 7), device=CPU)
    assert bench_ops.check_case(OPS[op], case, inputs) == ""


def leaky_gradient(x: torch.Tensor, spec: object) -> torch.Tensor:
    return lif(x + 1e-3 * (x - x.detach()), spec)


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (lambda x, spec: lif(x, IMAGENET if spec == CIFAR else CIFAR), "spikes differ"),
        (lambda x, spec: 2 * lif(x, spec), "not 0 or 1"),
        (lambda x, spec: lif(x, spec) * torch.nan, "spikes differ"),
        (leaky_gradient, "grad of x"),
    ],
)
def test_gate_refuses_a_wrong_op(monkeypatch: pytest.MonkeyPatch, wrong: bench_ops.Op, reason: str) -> None:
    monkeypatch.setitem(OPS, "lif", replace(OPS["lif"], run=wrong))
    rows = [row for row in bench_kernels(replace(TINY, ops=("lif",))) if row["op"] == "lif"]
    assert [row["status"] for row in rows] == ["failed check"]
    assert reason in rows[0]["note"]
    assert rows[0]["median_ms"] is None and rows[0]["copy_fraction"] is None
    assert benchmark.exit_code(rows) == 1


def test_an_op_that_raises_is_a_failed_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(x: torch.Tensor, spec: object) -> torch.Tensor:
        raise RuntimeError("no kernel")

    monkeypatch.setitem(OPS, "lif", replace(OPS["lif"], run=broken))
    rows = bench_kernels(replace(TINY, ops=("lif",)))
    assert [row["status"] for row in rows] == ["ok", "failed check", "ok"]
    assert "no kernel" in rows[1]["note"]
    assert benchmark.exit_code(rows) == 1


@pytest.mark.parametrize("provider", ["reference", "spikingjelly"])
@pytest.mark.parametrize("op", list(OPS))
def test_baselines_compute_the_same(op: str, provider: str) -> None:
    for spec in ("cifar", "imagenet"):
        case = Case(op=op, spec=spec, dtype="float32", memory_format="contiguous", num_steps=4)
        inputs = bench_ops.make_inputs(op=OPS[op], case=case, batch=2, frame=(3, 5, 7), device=CPU)
        baseline = bench_ops.make_baseline(provider, op, bench_ops.SPECS[spec], inputs)
        if baseline is None:
            pytest.skip(f"{provider} is not installed")
        standing_in = replace(OPS[op], run=lambda *tensors, baseline=baseline: baseline(*tensors[:-1]))
        assert bench_ops.check_case(standing_in, case, inputs) == ""


def test_time_budget_still_writes_the_copies() -> None:
    assert [row["op"] for row in bench_kernels(replace(TINY, time_budget_s=1e-9))] == ["copy", "copy"]


def test_saved_bytes_count_a_storage_once_and_not_the_output() -> None:
    x = torch.randn(10, requires_grad=True)
    assert bench_harness.measure_saved_bytes(lambda: x.view(2, 5) * x.view(2, 5)) == 40
    assert bench_harness.measure_saved_bytes(x.exp) == 0


def test_csv_appends_with_provenance_and_refuses_a_foreign_header(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "results.csv"
    config = replace(TINY, ops=("lif",), csv=path, png=tmp_path / "chart.png")
    bench_kernels(config)
    first = path.read_text()
    bench_kernels(config)
    assert path.read_text().startswith(first)
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 8 and tuple(rows[0]) == COLUMNS
    assert {(row["commit"], row["torch"], row["backend"]) for row in rows} == {("abc1234", torch.__version__, "eager")}
    assert all(row["date_utc"] and row["device"] and row["triton"] and row["timm_gac"] for row in rows)
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")
    path.write_text("model,accuracy\nx,1\n")
    with pytest.raises(ValueError, match=r"expected .* columns"):
        bench_kernels(config)
    assert path.read_text() == "model,accuracy\nx,1\n"


def test_results_are_printed_as_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "results.csv"
    config = replace(TINY, ops=("lif",), num_steps=(2, 3), csv=path, baselines=False)
    assert benchmark.show_results(bench_kernels(config)) == 0
    printed = capsys.readouterr().out
    for text in ("forward+backward", "channels_last", "timm_gac", "copy"):
        assert text in printed
    assert len(path.read_text().splitlines()) == 1 + 2 * 2 + 2


def test_table_renders_failed_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OPS, "lif", replace(OPS["lif"], run=lambda x, spec: 2 * lif(x, spec)))
    console = Console(record=True, width=250)
    console.print(benchmark.kernel_table(bench_kernels(replace(TINY, ops=("lif",)))))
    assert "failed check" in console.export_text()


def test_tables_fit_a_terminal() -> None:
    columns = {"op": "", "dtype": "", "median_ms": ".3f", "p20_ms": ".3f", "p80_ms": ".3f", "peak_gib": ".2f"}
    columns |= {"status": "", "note": ""}
    times = {"median_ms": 10.0, "p20_ms": 9.0, "p80_ms": 1234567.5, "peak_gib": None}
    rows = [{"op": op, "dtype": "float32", **times, "status": "ok", "note": op[:1]} for op in ("lif", "gac_encode")]

    def shown(width: int, rows: list[dict[str, Any]]) -> tuple[str, list[str]]:
        console = Console(width=width, file=io.StringIO())
        table, left_out = fit_table(rows_table(rows, columns, "times"), console)
        console.print(str(table.title), soft_wrap=True)
        table.title = None
        console.print(table)
        return console.file.getvalue(), left_out

    text, left_out = shown(100, rows)
    title = "times, dtype float32, median ms 10.000, p20 ms 9.000, p80 ms 1234567.500, status ok"
    assert left_out == [] and text.splitlines()[0] == title and "gib" not in text
    rows[1] |= {"median_ms": 11.0, "p20_ms": 8.0, "p80_ms": 1.0}
    text, left_out = shown(38, rows)
    assert left_out == ["p80 ms", "note"] and "gac_encode" in text and "11.000" in text and "1234567" not in text
    rows[1]["status"] = "failed check"
    text, left_out = shown(60, rows)
    assert left_out == ["p80 ms"] and "failed check" in text
    assert shown(100, rows[:1])[0].count("float32") == 1  # a single row has nothing in common with others


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expected ops out of .*got .'lift'"):
        KernelBenchConfig(ops=("lift",))
