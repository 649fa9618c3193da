"""Shows what would be published where, and publishes it when told to: ``make publish``, ``make publish PUBLISH=yes``.

Four things leave this repository: the package for PyPI (dist/), the kernels for the Kernel Hub (build/gac-kernels), the
trained models (hub/models) and the demonstration Space (hub/space) for the Hugging Face Hub. Without ``--publish``
nothing is sent and no connection is made.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi

import timm_gac
from timm_gac.hub.push import check_upload
from timm_gac.models.weights import HUB_ORGANISATION

ROOT = Path(__file__).resolve().parents[1]
SPACE = f"{HUB_ORGANISATION}/gated-attention-coding"
LEFT_OUT = ("__pycache__", ".cache")


@dataclass(frozen=True)
class Target:
    """A set of files and where they go.

    Attributes:
        kind: package, kernel, model or space.
        where: PyPI's project, or ORG/NAME on the Hub.
        folder: Folder on this machine.
        files: Paths in that folder.
    """

    kind: str
    where: str
    folder: Path
    files: tuple[str, ...]


def list_files(folder: Path) -> tuple[str, ...]:
    """Paths of all files in a folder, byte code left out.

    Raises:
        ValueError: It has none.
    """
    found = sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and not set(path.parts) & set(LEFT_OUT)
    )
    if not found:
        raise ValueError(f"expected files in {folder.relative_to(ROOT)}, got none: run `make release kernel` first")
    return tuple(found)


def targets(only: str | None = None) -> list[Target]:
    """What is published, in the order of publishing; of one kind where `only` names it."""
    build = (ROOT / "kernels" / "build.toml").read_text(encoding="utf-8")
    kernel = re.search(r'^repo-id = "(.+)"$', build, re.MULTILINE)
    if kernel is None:
        raise ValueError("expected repo-id in kernels/build.toml, got none: add it")
    places = [
        ("package", f"timm-gac {timm_gac.__version__}", ROOT / "dist"),
        ("kernel", kernel[1], ROOT / "build" / "gac-kernels"),
        *(
            ("model", f"{HUB_ORGANISATION}/{folder.name}", folder)
            for folder in sorted((ROOT / "hub" / "models").iterdir())
            if folder.is_dir()
        ),
        ("space", SPACE, ROOT / "hub" / "space"),
    ]
    return [Target(kind, where, folder, list_files(folder)) for kind, where, folder in places if only in (None, kind)]


def check(found: list[Target], tag: str, changes: str) -> None:
    """Refuse to publish what is not a release.

    Args:
        found: What would be published.
        tag: The tag of the commit that is checked out; empty where it has none or files differ from it.
        changes: Text of CHANGELOG.md.

    Raises:
        ValueError: The tag, the changelog or dist/ is not of this version, or a file is a pickle.
    """
    version = timm_gac.__version__
    if tag != f"v{version}":
        raise ValueError(f"expected a clean checkout of the tag v{version}, got {tag or 'none'}: commit and tag first")
    if not re.search(rf"^## \[{re.escape(version)}\] - \d{{4}}-\d\d-\d\d$", changes, re.MULTILINE):
        raise ValueError(f"expected '## [{version}] - DATE' in CHANGELOG.md, got none: name the release there")
    for target in found:
        if target.kind == "package":
            expected = {f"timm_gac-{version}-py3-none-any.whl", f"timm_gac-{version}.tar.gz"}
            if set(target.files) != expected:
                raise ValueError(f"expected {sorted(expected)} in dist, got {list(target.files)}: run `make release`")
        else:
            check_upload(target.files)


def current_tag() -> str:
    """The tag of the commit that is checked out, or nothing where it has none or tracked files differ."""
    described = ["git", "-C", str(ROOT), "describe", "--exact-match", "--tags", "--dirty", "--match", "v*"]
    done = subprocess.run(described, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else ""


def show(target: Target) -> None:
    """Print a target's files with their sizes and checksums."""
    print(f"\n{target.kind}: {target.where} (from {target.folder.relative_to(ROOT)})")
    for name in target.files:
        content = (target.folder / name).read_bytes()
        print(f"  {len(content):>12,}  {hashlib.sha256(content).hexdigest()[:12]}  {name}")


def publish(target: Target) -> None:
    """Send a target: the package with twine, the others as one commit each with the token of ``hf auth login``.

    Raises:
        subprocess.CalledProcessError: twine failed; its message is printed.
        OSError: The Hub refused the files or cannot be reached.
    """
    if target.kind == "package":
        files = [str(target.folder / name) for name in target.files]
        subprocess.run([sys.executable, "-m", "twine", "upload", "--non-interactive", *files], check=True)
        return
    api, kind = HfApi(library_name="timm_gac"), "space" if target.kind == "space" else "model"
    api.create_repo(target.where, repo_type=kind, space_sdk="gradio" if kind == "space" else None, exist_ok=True)
    commit = api.upload_folder(
        repo_id=target.where,
        folder_path=target.folder,
        repo_type=kind,
        allow_patterns=list(target.files),
        commit_message="Publish with timm-gac",
    )
    print(f"{target.kind}: {commit}")


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description="Show what would be published where; publish it with --publish.")
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--publish", action="store_true", help="really publish: needs PyPI's and the Hub's tokens")
    action.add_argument("--check", action="store_true", help="fail where this is not a release that can be published")
    parser.add_argument("--only", choices=["package", "kernel", "model", "space"], help="only this kind")
    options = parser.parse_args()
    try:
        found = targets(options.only)
        for target in found:
            show(target)
        try:
            check(found, current_tag(), (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"))
        except ValueError as error:
            if options.publish or options.check:
                raise
            print(f"\nnot ready to be published: {error}")
        if not options.publish:
            print("\nnothing was sent: `make publish PUBLISH=yes` publishes")
            return 0
        for target in found:
            publish(target)
    except (ValueError, OSError, subprocess.CalledProcessError) as error:
        sys.stderr.write(f"publish.py: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
