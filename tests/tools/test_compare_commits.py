"""`tools/compare_commits.py`: versions take turns, and a slower new one ends it with 1."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import compare_commits

# In the place of the worker that needs a GPU: says the milliseconds that stand in its tree.
STAND_IN = """
import json, sys
from pathlib import Path
print(json.dumps({"tree": str(Path.cwd()), "cases": ["training"]}), flush=True)
for line in sys.stdin:
    assert json.loads(line) == ["training", 0.4]
    print(Path("timm_gac/milliseconds").read_text(), flush=True)
"""


@pytest.mark.parametrize(("new", "status"), [(1.01, 0), (1.03, 1)])
def test_a_slower_version_is_told(monkeypatch, tmp_path: Path, capsys, new: float, status: int) -> None:
    monkeypatch.setattr(compare_commits, "WORKER", STAND_IN)
    for name, milliseconds in (("a", 1.0), ("b", new)):
        (tmp_path / name / "timm_gac").mkdir(parents=True)
        (tmp_path / name / "timm_gac" / "milliseconds").write_text(str(milliseconds))
    folders, out = [str(tmp_path / "a"), str(tmp_path / "b")], tmp_path / "times.json"
    assert compare_commits.main([*folders, "--rounds", "3", "--json", str(out)]) == status
    assert f"training: {new:.4f} ms, before 1.0000 ms, ratio {new:.4f}" in capsys.readouterr().out
    assert json.loads(out.read_text()) == {"training": {"old": [1.0] * 3, "new": [new] * 3}}


def test_neither_commit_nor_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected a commit or a folder with timm_gac in it, got 'none'"):
        compare_commits.tree_of("none", tmp_path)


def test_a_version_that_ends_is_told(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(compare_commits, "WORKER", "raise SystemExit(3)")
    (tmp_path / "timm_gac").mkdir()
    with pytest.raises(RuntimeError, match="a version ended with status 3"):
        compare_commits.main([str(tmp_path), str(tmp_path)])
