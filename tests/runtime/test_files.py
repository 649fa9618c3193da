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

IN_SCRATCH = """
import os, signal, sys
from pathlib import Path
from timm_gac.runtime.files import scratch_folder
with scratch_folder(Path(sys.argv[1])) as folder:
    (folder / "weights").write_text("half of them")
    if len(sys.argv) > 2:
        os.kill(os.getpid(), getattr(signal, sys.argv[2]))
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


def test_a_scratch_folder_lies_beside_its_target_and_goes_with_the_block(tmp_path: Path) -> None:
    with files.scratch_folder(tmp_path / "model") as outer, files.scratch_folder(tmp_path / "model") as inner:
        assert outer.parent == inner.parent == tmp_path and outer != inner and outer.exists()  # both of living blocks
        (inner / "folder").mkdir()
    with pytest.raises(KeyboardInterrupt), files.scratch_folder(tmp_path / "model"):
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(os.name != "posix", reason="signals and locks are POSIX's")
def test_a_scratch_folder_of_a_killed_process_is_deleted_by_the_next(warm_python: WarmPython, tmp_path: Path) -> None:
    target = tmp_path / "a[1]"
    assert warm_python(["-c", IN_SCRATCH, str(target), "SIGKILL"]).returncode == -9
    (leftover,) = tmp_path.iterdir()
    with files.scratch_folder(tmp_path / "a"), files.scratch_folder(tmp_path / "a[1]b"):
        assert leftover.exists(), "of another target"
    with files.scratch_folder(target) as living:
        assert not leftover.exists()
        assert warm_python(["-c", IN_SCRATCH, str(target)]).returncode == 0
        assert living.exists(), "of a living process"
    assert not list(tmp_path.iterdir())


def test_only_our_own_scratch_folders_are_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = f"{files._machine()}{'0' * 32}"
    (tmp_path / "theirs").mkdir()
    for name in (
        ".model.backup",
        ".model.timm_gac",
        f".model.{ours}",
        f".model.{ours[1:]}.timm_gac",
        ".model.a.timm_gac",
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").touch()
    (tmp_path / f".model.{ours}.timm_gac").symlink_to(tmp_path / "theirs", target_is_directory=True)
    (tmp_path / f".model.{ours[:-1]}1.timm_gac").touch()  # a file
    before = sorted(tmp_path.rglob("*"))
    with files.scratch_folder(tmp_path / "model"):
        pass
    assert sorted(tmp_path.rglob("*")) == before
    leftover = tmp_path / f".model.{ours[:-1]}2.timm_gac"
    leftover.mkdir()
    with monkeypatch.context() as patched:
        patched.setattr(files, "fcntl", None)  # without locks nobody knows whose it is
        with files.scratch_folder(tmp_path / "model"):
            assert leftover.exists()


@pytest.mark.skipif(os.name != "posix", reason="locks are POSIX's")
def test_a_scratch_folder_of_another_machine_is_deleted_after_an_hour(tmp_path: Path) -> None:
    other = tmp_path / f".model.{'0' * 40}.timm_gac"
    other.mkdir()
    (other / "weights").touch()
    long_ago = time.time() - files.LEFTOVER_SECONDS - 1
    os.utime(other, (long_ago, long_ago))
    with files.scratch_folder(tmp_path / "model"):
        assert other.exists(), "something in it is new"
    os.utime(other / "weights", (long_ago, long_ago))
    with files.scratch_folder(tmp_path / "model"):
        assert not other.exists()


@pytest.mark.skipif(os.name != "posix", reason="locks are POSIX's")
def test_a_scratch_folder_that_is_taken_for_a_leftover_before_it_is_locked_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, seen = files._lock, list[Path]()

    def late(folder: Path) -> int | None:
        seen.append(folder)
        if len(seen) == 1:
            files._delete_scratch(tmp_path / "model")
        return lock(folder)

    monkeypatch.setattr(files, "_lock", late)
    with files.scratch_folder(tmp_path / "model") as folder:
        assert folder.exists() and not seen[0].exists() and list(tmp_path.iterdir()) == [folder]


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
