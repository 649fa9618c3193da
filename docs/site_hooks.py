"""Hooks of mkdocs: the site carries the files that its pages link to, and its reference misses no public name."""

from __future__ import annotations

import ast
import logging
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
SOURCES = {"timm_gac": ROOT, "gac_kernels": ROOT / "kernels" / "torch-ext"}
# Shown on the page of gac_kernels, where they are from.
SHOWN_ELSEWHERE = {"timm_gac": {"CIFAR", "IMAGENET", "LIFSpec", "use_backend", "__version__"}}
LOG = logging.getLogger("mkdocs.hooks.site")
LINK = re.compile(r"(?<=\]\()(\.\./[^)#\s]+)(?=[)#])")


def outside(page: str, target: str) -> str | None:
    """Path in the repository of what a page links to, None where it is part of docs/."""
    path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), target))
    return None if path.startswith("docs/") else path


def on_files(files: Files, config: Any) -> Files:
    """Add the files that pages link to, each once; of a folder nothing."""
    pages = [file for file in files if file.is_documentation_page()]
    for page in pages:
        for target in LINK.findall(page.content_string):
            path = outside(page.src_uri, target)
            if path and (ROOT / path).is_file() and f"files/{path}" not in files.src_uris:
                # A page of the repository, such as CONTRIBUTING.md, is carried along as it is, not as one of the site.
                name = f"files/{path}.txt" if path.endswith(".md") else f"files/{path}"
                if name not in files.src_uris:
                    files.append(File.generated(config, name, content=(ROOT / path).read_bytes()))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Point links that leave docs/ at the files that the site carries; a link to a folder becomes its name."""

    def moved(link: re.Match[str]) -> str:
        path = outside(page.file.src_uri, link[1])
        if path is None:
            return link[1]
        name = f"files/{path}.txt" if path.endswith(".md") else f"files/{path}"
        return posixpath.relpath(name, posixpath.dirname(page.file.src_uri) or ".")

    folders = re.compile(r"\[([^\]]+)\]\((\.\./[^)#\s]+)\)")
    markdown = folders.sub(lambda link: link[1] if is_folder(page.file.src_uri, link[2]) else link[0], markdown)
    return LINK.sub(moved, markdown)


def is_folder(page: str, target: str) -> bool:
    """Whether a page links to a folder of the repository, which the site does not carry."""
    path = outside(page, target)
    return path is not None and (ROOT / path).is_dir()


def on_page_content(html: str, page: Any, **_: Any) -> None:
    """Warn, which a strict build takes for an error, where a page of the reference lacks a name of ``__all__``."""
    if not page.file.src_uri.startswith("api/"):
        return
    package = str(page.title)
    folder = SOURCES[package.partition(".")[0]].joinpath(*package.split("."))
    for node in ast.parse((folder / "__init__.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            names = set(ast.literal_eval(node.value)) - SHOWN_ELSEWHERE.get(package, set())
            missing = sorted(name for name in names if not re.search(rf'id="[\w.]*\.{name}"', html))
            if missing:
                LOG.warning("%s does not show %s", page.file.src_uri, ", ".join(missing))
