"""Files are written whole or not at all, whatever ends the process; tables grow by rows."""

from __future__ import annotations

import json
import os
import stat
import time
from pathlib import Path

import pytest

from timm_gac.runtime import files
from warm import WarmPython

KILLED = """
import os, signal, sys
from pathlib import Path
from timm_gac.runtime.files import write_text
os.fsync = lambda descriptor: os.kill(os.getpid(), getattr(signal, sys.argv[2]))
write_text(Path(sys.argv[1]), "new" * 100_000)
"""


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    files.write_bytes(folder / "bytes", b"\x00\xff\r\n")
    files.write_text(folder / "text", "eins\nzwei, für\n")
    files.write_json(folder / "json", {"a": [1, None], "b": "ü"})
    files.write_csv(folder / "csv", ("x", "y"), [{"x": 1, "y": None}, {"x": 0.1 + 0.2, "y": "a,b"}])
    assert (folder / "bytes").read_bytes() == b"\x00\xff\r\n"
    assert (folder / "text").read_bytes() == "eins\nzwei, für\n".encode()
    assert json.loads((folder / "json").read_text(encoding="utf-8")) == {"a": [1, None], "b": "ü"}
    assert (folder / "csv").read_bytes() == b'x,y\n1,\n0.30000000000000004,"a,b"\n'
    assert sorted(file.name for file in folder.iterdir()) == ["bytes", "csv", "json", "text"]


@pytest.mark.skipif(os.name != "posix", reason="permission bits are POSIX's")
def test_a_file_has_the_permissions_that_the_user_set(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        files.write_text(tmp_path / "a", "x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["disk", "ctrl-c"])
def test_an_exception_leaves_the_old_file_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    file = tmp_path / "a.json"
    files.write_json(file, {"old": True})

    def fail(_descriptor: int) -> None:
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", fail)
        with pytest.raises(type(error)):
            files.write_json(file, {"new": True})
    assert json.loads(file.read_text()) == {"old": True} and list(tmp_path.iterdir()) == [file]
    with pytest.raises(TypeError), files.replace_file(file) as stream:
        stream.write("text")  # type: ignore[arg-type]
    assert json.loads(file.read_text()) == {"old": True} and list(tmp_path.iterdir()) == [file]


@pytest.mark.skipif(os.name != "posix", reason="signals are POSIX's")
def test_a_kill_between_write_and_rename_leaves_the_old_file(warm_python: WarmPython, tmp_path: Path) -> None:
    file = tmp_path / "a[1].txt"
    file.write_text("old")
    ended = warm_python(["-c", KILLED, str(file), "SIGKILL"])
    assert ended.returncode == -9
    assert file.read_text() == "old"
    (leftover,) = set(tmp_path.iterdir()) - {file}
    files.write_text(file, "newer")  # may still be another process's: it stays
    assert file.read_text() == "newer" and leftover.exists()
    long_ago = time.time() - files.LEFTOVER_SECONDS - 1
    os.utime(leftover, (long_ago, long_ago))
    files.write_text(file, "newest")
    assert file.read_text() == "newest" and list(tmp_path.iterdir()) == [file]


def test_two_writers_of_one_file_do_not_meet(tmp_path: Path) -> None:
    file = tmp_path / "a"
    with files.replace_file(file) as outer:
        outer.write(b"outer")
        files.write_bytes(file, b"inner")
        assert file.read_bytes() == b"inner"
    assert file.read_bytes() == b"outer" and list(tmp_path.iterdir()) == [file]


def test_a_table_grows_and_refuses_another_header(tmp_path: Path) -> None:
    file = tmp_path / "new" / "rows.csv"
    files.append_csv(file, ("a", "b"), [{"a": 1, "b": 2}])
    size = file.stat().st_size
    files.append_csv(file, ("a", "b"), [{"a": 3, "b": None}])
    assert file.read_bytes() == b"a,b\n1,2\n3,\n"
    files.append_csv(file, ("a", "b"), [{"a": 4, "b": 5}, {"a": 6, "b": 7}], keep_bytes=size)
    assert file.read_bytes() == b"a,b\n1,2\n4,5\n6,7\n"
    with pytest.raises(ValueError, match="to have the columns"):
        files.append_csv(file, ("a", "c"), [{"a": 1, "c": 2}])
    assert file.read_bytes() == b"a,b\n1,2\n4,5\n6,7\n"
    file.write_text("")
    files.append_csv(file, ("a", "c"), [{"a": 1, "c": 2}])
    assert file.read_bytes() == b"a,c\n1,2\n"


def test_a_table_that_cannot_be_written_is_refused_beforehand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files.check_csv(tmp_path / "new" / "rows.csv", ("a",))
    file = tmp_path / "rows.csv"
    file.write_text("a\n1\n")
    files.check_csv(file, ("a",))
    assert [path.name for path in tmp_path.iterdir()] == ["rows.csv"] and file.read_text() == "a\n1\n"
    with pytest.raises(
        ValueError, match=r"expected a table that can be written, got .*other\.csv' \(Not a directory\)"
    ):
        files.check_csv(file / "other.csv", ("a",))

    def refuse(*_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(files.tempfile, "TemporaryFile", refuse)
    with pytest.raises(ValueError, match=r"got .*new\.csv' \(Read-only file system\): choose another file"):
        files.check_csv(tmp_path / "new.csv", ("a",))
    opened = Path.open
    monkeypatch.setattr(
        Path, "open", lambda path, mode="r", **how: (refuse if "a" in mode else opened)(path, mode, **how)
    )
    with pytest.raises(ValueError, match=r"got .*rows\.csv' \(Read-only file system\): choose another file"):
        files.check_csv(file, ("a",))
