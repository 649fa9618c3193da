"""Files that are written whole or not at all, and tables that grow by rows."""

from __future__ import annotations

import csv
import glob
import io
import json
import os
import platform
import re
import shutil
import tempfile
import time
import uuid
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

# A process that is killed leaves its unfinished file. The next write of the same file deletes those of this age.
LEFTOVER_SECONDS = 3600.0
_SCRATCH = ".timm_gac"  # how names of scratch folders end


@contextmanager
def replace_file(path: Path) -> Iterator[BinaryIO]:
    """A stream whose bytes become the file when the block ends without an exception.

    The bytes go to a hidden file in the same folder and are flushed to the disk. The hidden file is then renamed, which
    POSIX does in one step: a reader sees the old file or the new one. An exception in the block leaves the old file,
    and no other.

    Args:
        path: The file; its folder is made where it is missing.

    Raises:
        OSError: The file cannot be written, such as to a full disk.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _delete_leftovers(path)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    try:
        with partial.open("xb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


@contextmanager
def scratch_folder(target: Path) -> Iterator[Path]:
    """A hidden folder beside a file or folder, in which this is made before it is moved; deleted when the block ends.

    A process that is killed leaves its scratch folder, ``.NAME.<40 hexadecimal digits>.timm_gac``. The next one for the
    same target deletes it, as no living process holds the lock on it (``flock``, which the system drops with its
    process). A folder of another machine must also have been idle for an hour, as some file systems keep such locks
    from other machines. Without such locks (Windows, NFS) leftovers stay.

    Args:
        target: What will be written; its parent folder is there.

    Raises:
        OSError: The folder cannot be made.
    """
    _delete_scratch(target)
    folder, lock = _make_scratch(target)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def write_bytes(path: Path, content: bytes) -> None:
    """Write bytes, whole or not at all (see `replace_file`)."""
    with replace_file(path) as stream:
        stream.write(content)


def write_text(path: Path, content: str) -> None:
    """Write text in UTF-8, whole or not at all, with its line ends as they are."""
    write_bytes(path, content.encode("utf-8"))


def write_json(path: Path, content: Any, indent: int = 2) -> None:
    """Write JSON with a line end behind it, whole or not at all."""
    write_text(path, json.dumps(content, indent=indent) + "\n")


def parse_json(data: bytes) -> Any:
    """The content of a JSON file, all of whose text can be written again.

    Raises:
        ValueError: It is no JSON, or holds half of a surrogate pair, which JSON may spell but UTF-8 cannot.
        RecursionError: It is nested too deeply.
    """
    content = json.loads(data)
    json.dumps(content, ensure_ascii=False).encode()
    return content


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a table, whole or not at all: one mapping from column to value a row, None as an empty cell."""
    write_text(path, _csv_text(columns, rows, header=True))


def check_new_folder(
    folder: Path, overwrite: bool, remedy: str = "choose another or overwrite=True (--overwrite)"
) -> None:
    """Refuse to write into a folder that holds files.

    Args:
        folder: Where something will be written.
        overwrite: Whether the folder may hold files.
        remedy: What the user can do instead, for the error message.

    Raises:
        ValueError: It is a file, or is not empty and ``overwrite`` is not set.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"expected a folder to write to, got the file {str(folder)!r}: choose another name")
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise ValueError(f"expected a new or empty folder, got {str(folder)!r}: {remedy}")


def append_csv(
    path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]], keep_bytes: int | None = None
) -> None:
    """Append rows to a table, with a header if it is new. The rows that it holds stay as they are.

    The rows go out in one write, so that several processes may append to one file.

    Args:
        path: The file; its folder is made where it is missing.
        columns: The header, in order.
        rows: One mapping from column to value each; None is an empty cell.
        keep_bytes: Cut the file to this size first: a run that writes its own rows anew gives the size before its rows.

    Raises:
        ValueError: The file has another header.
    """
    _check_header(path, columns)
    path.parent.mkdir(parents=True, exist_ok=True)
    if keep_bytes is not None and path.exists():
        os.truncate(path, keep_bytes)
    with path.open("ab", buffering=0) as stream:
        stream.write(_csv_text(columns, rows, header=stream.tell() == 0).encode("utf-8"))


def check_csv(path: Path, columns: Sequence[str]) -> None:
    """Raise unless rows of these columns can be appended to a table. Worth a call before an hour of measuring.

    Raises:
        ValueError: The file has another header, is none that can be read so, or cannot be written.
    """
    _check_header(path, columns)
    try:  # tried, as permissions say nothing of a file system that is read-only
        if path.exists():
            path.open("ab").close()
        else:
            folder = next(folder for folder in path.absolute().parents if folder.exists())
            tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(
            f"expected a table that can be written, got {str(path)!r} ({error.strerror}): choose another file"
        ) from error


def _check_header(path: Path, columns: Sequence[str]) -> None:
    if path.is_dir():
        raise ValueError(f"expected a file for a table, got the folder {str(path)!r}: name a file in it")
    if not path.exists() or path.stat().st_size == 0:
        return
    try:
        with path.open(newline="", encoding="utf-8") as stream:
            header = next(csv.reader(stream))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"expected {path} to be a table (CSV), got another file: choose another") from error
    if header != list(columns):
        raise ValueError(f"expected {path} to have the columns {list(columns)}, got {header}: choose another file")


def sync_folder(folder: Path) -> None:
    """Flush the names in a folder to the disk, where the system allows it (POSIX)."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _csv_text(columns: Sequence[str], rows: Iterable[Mapping[str, Any]], *, header: bool) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    if header:
        writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _delete_leftovers(path: Path) -> None:
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*.partial"):
        try:
            if time.time() - leftover.stat().st_mtime > LEFTOVER_SECONDS:
                leftover.unlink()
        except FileNotFoundError:  # another process was faster
            continue


def _make_scratch(target: Path) -> tuple[Path, int | None]:
    """A new scratch folder and the descriptor that locks it, None where the file system has no locks."""
    while True:
        folder = target.parent / f".{target.name}.{_machine()}{uuid.uuid4().hex}{_SCRATCH}"
        folder.mkdir(mode=0o700)
        # Until it is locked another process may take it for a leftover, and hold its lock to delete it: then another.
        with suppress(BlockingIOError, FileNotFoundError):
            lock = _lock(folder)
            if lock is None or folder.exists():
                return folder, lock
            os.close(lock)


def _machine() -> str:
    return f"{zlib.crc32(platform.node().encode()):08x}"


def _lock(folder: Path) -> int | None:
    """A descriptor that locks a folder until it is closed; None where the file system has no such locks.

    Raises:
        BlockingIOError: A living process, or another thread of this one, holds the lock.
        OSError: The folder cannot be opened.
    """
    if fcntl is None:
        return None
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _delete_scratch(target: Path) -> None:
    start = f".{target.name}."
    for folder in target.parent.glob(f"{glob.escape(start)}*{_SCRATCH}"):
        identity = folder.name.removeprefix(start).removesuffix(_SCRATCH)
        if not re.fullmatch("[0-9a-f]{40}", identity) or folder.is_symlink():
            continue
        with suppress(OSError):  # of a living process, of another user, or deleted by another process meanwhile
            lock = _lock(folder)
            if lock is None:
                continue
            try:
                if identity.startswith(_machine()) or _idle_seconds(folder) > LEFTOVER_SECONDS:
                    shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(lock)


def _idle_seconds(folder: Path) -> float:
    """How long ago a folder or something in it was last written."""
    return time.time() - max(path.stat().st_mtime for path in (folder, *folder.rglob("*")))
