"""What a run says of how far it is, off a terminal."""

from __future__ import annotations

import pytest

from timm_gac.train import Recipe, progress
from timm_gac.train.progress import Progress

ROW = {"epoch": 1, "step": 2, "lr": 0.1, "test_top1": "", "firing_rate": ""}


def test_a_slow_first_epoch_is_told_once_without_its_first_step(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    shown = Progress(Recipe(), total=2000, done=0, visible=True)
    for step, now in enumerate((60.0, 62.0, 64.0, 68.0, 70.0, 72.0, 90.0), 1):
        clock[0] = now
        shown.step(step)
        said = capsys.readouterr().out
        assert said == ("step 5 of 2,000: 2.5 s a step, about 83 min left\n" if step == 5 else ""), step


def test_where_epochs_are_told_it_is_not(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    shown = Progress(Recipe(), total=2000, done=0, visible=True)
    shown.step(1)
    shown.epoch(ROW, 0.1)
    clock[0] = 60.0
    shown.step(3)
    assert capsys.readouterr().out.count("\n") == 1
