"""Stage the kernel project as the Kernel Hub holds it: ``python kernels/stage.py [FOLDER]``, or ``make kernel``.

The build is noarch, plain Python, so staging it needs no compiler: each variant is a copy of ``torch-ext/gac_kernels``
with metadata, whose operators live in a namespace of its own. So it loads beside the wheel's copy in one process.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import io
import json
import re
import shutil
import sys
import tempfile
import tokenize
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parent
NAME = "gac_kernels"
MARK = "build.toml"  # a folder without one was not staged here, and is left alone
# Where sources name the operators' namespace: torch.ops.gac_kernels, "gac_kernels::lif", Library("gac_kernels", ...).
NAMESPACE = re.compile(rf"(?<=torch\.ops\.){NAME}\b|(?<=\"){NAME}(?=::)|(?<=Library\(\"){NAME}(?=\")")


def read_build(project: Path = PROJECT) -> dict[str, Any]:
    """The ``[general]`` table of build.toml, with the Hub's repository id as ``repo-id``."""
    try:
        import tomllib
    except ModuleNotFoundError:  # Python 3.10
        import tomli as tomllib
    build = tomllib.loads((project / "build.toml").read_text())
    return {**build["general"], "repo-id": build["general"]["hub"]["repo-id"]}


def source_files(project: Path = PROJECT) -> dict[str, bytes]:
    """The files of the package by their path in it, byte code left out."""
    root = project / "torch-ext" / NAME
    found = sorted(path for path in root.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in found}


def source_hash(files: dict[str, bytes]) -> str:
    """Seven digits that change with any source file: they make the namespace one of this build alone."""
    digest = hashlib.sha1(usedforsecurity=False)
    for name, content in files.items():
        digest.update(f"{name}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()[:7]


def rename(source: str, namespace: str, name: str = "the file") -> str:
    """The source with its operators in another namespace.

    Raises:
        ValueError: The old name is left somewhere in the code, in a form that is not known here.
    """
    renamed = NAMESPACE.sub(namespace, source)
    previous = tokenize.NEWLINE
    for token in tokenize.generate_tokens(io.StringIO(renamed).readline):
        if token.type == tokenize.COMMENT:
            continue
        opening = (tokenize.NEWLINE, tokenize.NL, tokenize.INDENT, tokenize.DEDENT)
        docstring = token.type == tokenize.STRING and previous in opening
        if not docstring and token.type in (tokenize.NAME, tokenize.STRING) and re.search(rf"\b{NAME}\b", token.string):
            raise ValueError(
                f"expected the namespace {NAME} as torch.ops.{NAME}, '{NAME}::op' or Library('{NAME}'), got "
                f"{token.string!r} in line {token.start[0]} of {name}: spell it one of these ways"
            )
        previous = token.type
    return renamed


def write_variant(folder: Path, files: dict[str, bytes], build: dict[str, Any], backend: str) -> None:
    """One build variant: the package with renamed operators, and metadata.json with a checksum of each file."""
    namespace = f"_{NAME}_{backend}_{source_hash(files)}"
    for name, content in files.items():
        if name.endswith(".py"):
            content = rename(content.decode(), namespace, name).encode()
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
    digests = {
        path.relative_to(folder).as_posix(): base64.b64encode(hashlib.sha256(path.read_bytes()).digest()).decode()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    metadata = {
        "id": namespace,
        "name": build["name"],
        "version": build["version"],
        "license": build["license"],
        "python-depends": [],
        "backend": {"type": backend},
        "digest": {"algorithm": "sha256", "files": digests},
    }
    (folder / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")


def stage(out: Path, project: Path = PROJECT) -> Path:
    """Write the kernel repository: build/torch-cpu, build/torch-cuda, the sources, build.toml and README.md.

    Args:
        out: Folder to write; new, empty, or one that was staged before, which is replaced whole.
        project: The kernel project.

    Returns:
        The folder.

    Raises:
        ValueError: The folder holds something else.
    """
    if out.exists() and not (out.is_dir() and (not any(out.iterdir()) or (out / MARK).is_file())):
        raise ValueError(f"expected a new, an empty or a staged folder, got {str(out)!r}: choose another")
    build, files = read_build(project), source_files(project)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as scratch:
        staged = Path(scratch, "staged")
        for backend in build["backends"]:
            write_variant(staged / "build" / f"torch-{backend}", files, build, backend)
        for name, content in files.items():
            target = staged / "torch-ext" / NAME / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
        shutil.copyfile(project / "build.toml", staged / MARK)
        shutil.copyfile(project / "CARD.md", staged / "README.md")
        if out.exists():
            out.replace(Path(scratch, "previous"))
        staged.replace(out)
    return out


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description="Stage the kernel project as the Kernel Hub holds it.")
    parser.add_argument("folder", nargs="?", type=Path, default=Path("build", "gac-kernels"))
    folder = parser.parse_args().folder
    try:
        stage(folder)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"stage.py: {error}\n")
        return 2
    repo_id = read_build()["repo-id"]
    sys.stdout.write(f"staged {repo_id} in {folder}; to use it: LOCAL_KERNELS={repo_id}={folder.resolve()}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
