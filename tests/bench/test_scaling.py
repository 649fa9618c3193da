"""The benchmark of scaling: what it refuses and which combinations it runs; its figures are tested with processes."""

from __future__ import annotations

import pytest

from timm_gac.bench.scaling import ScalingConfig


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(providers=("fsdp",)), "providers out of"),
        (dict(batch_norms=("none",)), "batch_norms out of"),
        (dict(precision="float16"), "precision out of"),
        (dict(batch=0), "batch >= 1"),
        (dict(model="resnet18"), "resnet18"),
        (dict(processes=1), "at least 2"),
        (dict(providers=("all_reduce+graph",)), "CUDA devices for a graph"),
    ],
)
def test_bad_configurations_are_a_sentence(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ScalingConfig(**{"device": "cpu"} | changes)


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert ScalingConfig(device="cuda").size == 2
    with pytest.raises(ValueError, match="a GPU for each, got 4 and 2: run it where there are more"):
        ScalingConfig(device="cuda", processes=4)


def test_graphs_run_on_gpus_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    ddp = [("ddp", "local"), ("ddp", "sync")]
    plain = [("all_reduce", "local"), ("all_reduce", "sync")]
    graphed = [("all_reduce+graph", "local"), ("all_reduce+graph", "sync")]
    assert ScalingConfig(device="cpu").combinations() == ddp + plain
    assert ScalingConfig(device="cuda").combinations() == ddp + plain + graphed
