"""The benchmark of training loops on the CPU: its clock, its loops, its rows and the files it writes."""

from __future__ import annotations

import csv
import logging
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from timm_gac.bench.loops import bench, entries
from timm_gac.bench.loops.clock import BLOCKS, Clock, ResidentBatches
from timm_gac.bench.loops.options import ANCHOR, ENTRIES, LoopBenchConfig
from timm_gac.bench.loops.ours import Settings, plain_loop, short_epochs

CPU = torch.device("cpu")
TINY = LoopBenchConfig(
    model="test_gac_msresnet",
    batch=4,
    image_size=8,
    num_steps=2,
    precision="float32",
    seconds=0.01,
    commit="abc1234",
    device="cpu",
)
# What timm's train.py does around its loop, in the order in which it does it.
SCRIPT = """
import argparse
import torch
from timm.data import create_dataset, create_loader
from timm.models import create_model
from timm.task import ClassificationTask

parser = argparse.ArgumentParser()
for name in ("data-dir", "model", "amp-dtype", "device", "output"):
    parser.add_argument("--" + name)
for name in ("num-classes", "batch-size", "warmup-epochs", "epochs", "workers"):
    parser.add_argument("--" + name, type=int)
for name in ("amp", "channels-last", "torchcompile"):
    parser.add_argument("--" + name, action="store_true")
parser.add_argument("--lr", type=float)
args = parser.parse_args()
assert args.channels_last and args.amp == (args.amp_dtype == "bfloat16") and args.epochs == 1
model = create_model(args.model, num_classes=args.num_classes).to(args.device)
loader = create_loader(create_dataset("", root=args.data_dir), 8, args.batch_size, is_training=True)
task = ClassificationTask(model, torch.nn.CrossEntropyLoss(), device=args.device)
optimizer = torch.optim.SGD(model.parameters(), lr=args.lr)
for images, labels in loader:
    assert images.shape[0] == args.batch_size and len(loader) > 1000
    with torch.autocast(args.device, torch.bfloat16, enabled=args.amp):
        loss = task(images, labels)["loss"]
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
evaluated = [images for images, _ in create_loader(create_dataset("", split="val"), 8, args.batch_size)]
assert 1 < len(evaluated) < 10
"""


def rows_of(config: LoopBenchConfig, *only: str) -> list[dict]:
    return bench.bench_loops(replace(config, only=only))


def test_rows_and_their_arithmetic(tmp_path: Path) -> None:
    names = ("plain/timm_gac", "plain/timm_gac_packed", "accelerate/timm_gac", "loader/npz", "loader/folder")
    config = replace(TINY, csv=tmp_path / "folder" / "loops.csv", png=tmp_path / "loops.png")
    rows = rows_of(config, *names)
    assert [row["entry"] for row in rows] == list(names)
    for row in rows:
        assert tuple(row) == bench.COLUMNS and row["status"] == "ok", row["note"]
        assert row["images_per_s"] == pytest.approx(1e3 * 4 / row["median_ms"])
        assert row["p20_ms"] <= row["median_ms"] <= row["p80_ms"] and row["repetitions"] >= BLOCKS
        assert row["setup_s"] > 0 and row["host_cores"] >= 1
        assert row["of_graphed_step"] is None and row["peak_gib"] is None  # there is no GPU
    assert "accelerate" in rows[2]["versions"] and rows[2]["optimizer"] == "AdamW of timm"
    assert (tmp_path / "loops.png").read_bytes().startswith(b"\x89PNG")
    with config.csv.open(newline="") as stream:
        written = list(csv.DictReader(stream))
    assert [row["entry"] for row in written] == list(names) and {row["commit"] for row in written} == {"abc1234"}


def test_what_is_measured_is_not_measured_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = replace(TINY, csv=tmp_path / "loops.csv", seconds=0.001)
    rows_of(config, "loader/npz")
    with caplog.at_level(logging.INFO):
        assert [row["entry"] for row in rows_of(config, "loader")] == ["loader/folder"]
    assert "--again" in caplog.text
    assert [row["entry"] for row in rows_of(replace(config, again=True), "loader/npz")] == ["loader/npz"]
    for change in ({"batch": 6}, {"commit": "def5678"}):  # other settings, another commit
        assert len(rows_of(replace(config, **change), "loader/npz")) == 1
    with config.csv.open(newline="") as stream:
        assert len(list(csv.DictReader(stream))) == 5
    config.csv.write_text("model,accuracy\nx,1\n")
    with pytest.raises(ValueError, match=r"expected .* columns"):
        rows_of(config, "loader")
    assert config.csv.read_text() == "model,accuracy\nx,1\n"


@pytest.mark.parametrize(("package", "loop"), [("transformers", "trainer"), ("pytorch_lightning", "lightning")])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_trainers_of_other_libraries(package: str, loop: str, precision: str) -> None:
    pytest.importorskip(package)
    (row,) = rows_of(replace(TINY, precision=precision), f"{loop}/timm_gac")
    assert row["status"] == "ok", row["note"]
    assert row["images_per_s"] > 0 and package.replace("_", "-") in row["versions"]


def test_a_missing_library_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    rows = rows_of(TINY, "trainer/timm_gac", "lightning/timm_gac")
    assert [row["status"] for row in rows] == ["skipped"] * 2
    assert ["pip install transformers" in rows[0]["note"], "pip install pytorch-lightning" in rows[1]["note"]] == [
        True
    ] * 2


def test_timm_script_gets_our_network_and_data(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    config = replace(TINY, timm_train=script, precision="bfloat16")
    (row,) = rows_of(config, "timm/timm_gac")
    assert row["status"] == "ok", row["note"]
    assert row["images_per_s"] > 0 and "timm" in row["versions"] and row["optimizer"] == "SGD of timm"
    script.write_text("import sys\nsys.exit('this script\\nhas no loop')\n")
    (row,) = rows_of(config, "timm/timm_gac")
    assert row["status"] == "error" and row["note"] == "RuntimeError: has no loop" and bench.show_results([row]) == 1
    script.write_text("while True: pass\n")
    (row,) = rows_of(replace(config, entry_limit_s=12.0), "timm/timm_gac")
    assert row["status"] == "out of time"
    (row,) = rows_of(TINY, "timm/timm_gac")
    assert row["status"] == "skipped" and "--timm-train" in row["note"]


def test_compiled_networks_say_how_often_they_were_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    options: list[object] = []
    compile_with = torch.compile

    def compile_quickly(network: nn.Module, **given: object) -> object:
        options.append(given)
        return compile_with(network, backend="eager")

    monkeypatch.setattr(torch, "compile", compile_quickly)
    rows = rows_of(TINY, "plain/timm_gac+compile", "plain/timm_gac+reduce_overhead")
    for row in rows:
        assert row["status"] == "ok", row["note"]
        assert (row["graphs"], row["graph_breaks"], row["recompiles"], row["late_recompiles"]) == (3, 0, 1, 0)
        assert row["compile_s"] > 0 and row["epochs_s"] > 0
    assert options == [{"options": None}, {"mode": "reduce-overhead"}]


def test_graph_breaks_and_recompilation_are_counted() -> None:
    class Breaking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.calls = nn.Linear(3, 2), 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += self.training  # a number that is part of what was compiled
            x = x.mean((2, 3)) * self.calls
            torch._dynamo.graph_break()
            return self.fc(x)

    torch._dynamo.reset()
    network = torch.compile(Breaking(), backend="eager")
    images, labels = torch.randn(4, 3, 2, 2), torch.tensor([0, 1, 1, 0])
    row = short_epochs(network, images, labels, Settings(CPU, "float32", 4), 2)
    torch._dynamo.reset()
    assert row["graph_breaks"] > 0 and row["recompiles"] > 1


def test_loops_that_cannot_run_and_their_exit_status(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = rows_of(TINY, "step/timm_gac", "plain/timm_gac+graphed", "accelerate/timm_gac+graphed")
    assert [row["status"] for row in rows] == ["skipped"] * 3
    assert all("CUDA" in row["note"] and row["images_per_s"] is None for row in rows)
    assert bench.show_results(rows) == 0

    def fails(*_: object) -> None:
        raise RuntimeError("no loop\nsecond line")

    monkeypatch.setitem(entries.LOOPS, "plain", (fails, "SGD", ()))
    rows = rows_of(TINY, "plain/timm_gac")
    assert rows[0]["status"] == "error" and rows[0]["note"] == "RuntimeError: no loop"
    assert bench.show_results(rows) == 1

    def slow(*_: object) -> None:
        time.sleep(60)

    monkeypatch.setitem(entries.LOOPS, "plain", (slow, "SGD", ()))
    rows = rows_of(replace(TINY, entry_limit_s=5.0), "plain/timm_gac")
    assert rows[0]["status"] == "out of time"


@pytest.mark.parametrize(
    ("trains", "reason"), [(False, "expected the loop to train"), (True, "expected finite weights")]
)
def test_a_loop_that_does_not_train_is_not_timed(monkeypatch: pytest.MonkeyPatch, trains: bool, reason: str) -> None:
    def loop(network: nn.Module, batches: object, settings: Settings) -> None:
        for _ in batches:
            pass
        if trains:
            plain_loop(network, [(torch.full((2, 3, 8, 8), 1.0), torch.zeros(2, dtype=torch.long))], settings)
            with torch.no_grad():
                next(network.parameters()).fill_(float("nan"))

    monkeypatch.setitem(entries.LOOPS, "plain", (loop, "SGD", ()))
    (row,) = rows_of(TINY, "plain/timm_gac")
    assert row["status"] == "error" and reason in row["note"] and row["images_per_s"] is None


def test_clock_times_what_a_loop_does_between_two_batches() -> None:
    clock = Clock(CPU, 0.2)
    images, labels = torch.arange(8.0).view(8, 1, 1, 1), torch.arange(8)
    loader = ResidentBatches(images, labels, 2, ("images", "labels")).loader(clock)
    seen = []
    for batch in loader:
        assert batch["images"].flatten().tolist() == batch["labels"].tolist()
        assert batch["images"].untyped_storage().data_ptr() == images.untyped_storage().data_ptr()  # no copy
        seen.append(batch["labels"][0].item())
        time.sleep(0.02)
    row = clock.row(2)
    assert set(seen) == {0, 2, 4, 6} and row["median_ms"] >= 20
    assert row["images_per_s"] == pytest.approx(2e3 / row["median_ms"])
    assert row["repetitions"] == len(seen) - clock.warmup >= BLOCKS
    assert list(loader) == []  # it is over
    with pytest.raises(ValueError, match="until the clock ends"):
        Clock(CPU, 1.0).row(2)


def test_what_graphs_could_not_do_is_in_the_note() -> None:
    logger = logging.getLogger("timm_gac.runtime.graphed")
    before = logger.level
    with entries.reasons_for_eager() as found:
        logger.info("Net runs eagerly here, not as CUDA graphs, as it has hooks")
        logger.info("Net replays CUDA graphs for inputs of shape (4, 3, 8, 8)")
    logger.warning("Net runs eagerly here, after the block")
    assert found == ["Net runs eagerly here, not as CUDA graphs, as it has hooks"] and logger.level == before


def test_entries_begin_with_the_graphed_step_and_end_with_compilers() -> None:
    config = LoopBenchConfig(device="cuda")
    names = config.entries()
    assert names == list(ENTRIES) and names[0] == ANCHOR
    compiling = ["compile" in name or "overhead" in name for name in names]
    assert compiling == sorted(compiling)
    assert replace(config, only=("trainer", "*+compile")).entries()[0] == ANCHOR
    assert not any(name.startswith("step/") for name in replace(config, device="cpu").entries())
    for name in names:
        loop, network, way = entries.split_entry(name)
        assert loop in (*entries.LOOPS, "timm", "loader") and replace(config, only=(name,)).entries()[-1] == name
        assert way in ("", "graphed", *entries.COMPILING) and (network in bench_networks() or loop == "loader")


def bench_networks() -> set[str]:
    from timm_gac.bench.networks import NETWORKS

    return set(NETWORKS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "resnet18"}, "expected a model of this package, got 'resnet18'"),
        ({"only": ("plain/torch",)}, "expected an entry such as"),
        ({"precision": "float16"}, "expected precision out of"),
        ({"batch": 1}, "expected batch >= 2"),
        ({"seconds": 0.0}, "expected seconds > 0"),
        ({"epochs": 0}, "expected epochs >= 1"),
        ({"timm_train": Path("nowhere.py")}, "expected timm's train.py, got 'nowhere.py'"),
    ],
)
def test_wrong_options_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(TINY, **change)


def test_several_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="CUDA_VISIBLE_DEVICES"):
        replace(TINY, device="cuda")
