"""tools/draw_gates.py: each score and top-1 where a run has it, and a sentence where it has no tables."""

from __future__ import annotations

from pathlib import Path

import pytest

import draw_gates


def test_a_line_where_a_run_has_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "full.csv").write_text("epoch,test_top1\n1,\n2,0.25\n3,0.5\n", encoding="utf-8")
    (tmp_path / "full.gate.csv").write_text("epoch,largest_temporal,spatial_std\n2,8,0\n3,9,0\n", encoding="utf-8")
    (tmp_path / "direct.csv").write_text("epoch,test_top1\n2,0.5\n3,0.75\n", encoding="utf-8")
    figures = []
    monkeypatch.setattr(
        draw_gates, "new_figure", lambda *size, _=draw_gates.new_figure: figures.append(_(*size)) or figures[-1]
    )
    draw_gates.draw({"full": tmp_path / "full", "direct": tmp_path / "direct"}, tmp_path / "out.png")
    drawn = [
        {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axis.lines}
        for axis in figures[0].axes
    ]
    assert drawn == [
        {"full": ([2, 3], [8, 9])},
        {},
        {"full": ([2, 3], [25, 50]), "direct": ([2, 3], [50, 75])},
    ]
    assert (tmp_path / "out.png").read_bytes()[:4] == b"\x89PNG"


def test_a_table_without_rows_is_named(tmp_path: Path) -> None:
    (tmp_path / "run.csv").write_text("epoch,test_top1\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"expected rows in .*run\.csv, got none"):
        draw_gates.draw({"run": tmp_path / "run"}, tmp_path / "out.png")


@pytest.mark.parametrize("given", ["missing", "label=", "=prefix", "label=missing"])
def test_a_run_that_is_none_is_refused(given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr("sys.argv", ["draw_gates.py", str(tmp_path / "out.png"), given])
    with pytest.raises(SystemExit):
        draw_gates.main()
    assert f"expected LABEL=PREFIX with a table PREFIX.csv, got '{given}'" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
