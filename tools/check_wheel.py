"""Checks a built wheel as a user gets it: ``python tools/check_wheel.py FOLDER``, or ``make wheel``.

FOLDER holds one wheel. Three things are checked:

1. It holds every module and data file of both packages, and nothing else.
2. What its code imports is what it declares to need, extras included, and the other way round.
3. Installed alone in a fresh virtual environment it imports and its command line runs, with no optional package. That
   environment sees PyTorch and the other requirements of the one that runs this script through a .pth file, which leads
   to a folder of links without the optional packages; so nothing is downloaded.
"""

from __future__ import annotations

import argparse
import ast
import subprocess
import sys
import sysconfig
import tempfile
import venv
import zipfile
from collections.abc import Iterator
from email import message_from_bytes
from importlib.metadata import packages_distributions
from pathlib import Path, PurePosixPath

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
SOURCES = {"timm_gac": ROOT / "timm_gac", "gac_kernels": ROOT / "kernels" / "torch-ext" / "gac_kernels"}
# Imported without being declared, and why that is right.
UNDECLARED = {"triton": "comes with PyTorch where it runs; without it the plain PyTorch code does"}
# Where a distribution is not installed here, so that its import names cannot be looked up.
DISTRIBUTIONS = {"sklearn": "scikit-learn", "PIL": "pillow"}
# Extras for the users of the package; the others set up the tools of this repository.
USER_EXTRAS = ("train", "demo", "bench", "spikingjelly", "export")
# Declared for the user without an import in this package, and why.
UNIMPORTED = {
    "tensorboard": "accelerate logs to it",
    "onnx": "torch.onnx imports it",
    "onnxscript": "torch.onnx imports it",
    "loguru": "spikingjelly imports it without declaring it",
    "scienceplots": "spikingjelly imports it without declaring it",
}
CHILD = """
import importlib, importlib.metadata, sys
for name in sys.argv[2].split(","):
    module = importlib.import_module(name)
    assert module.__file__.startswith(sys.argv[1]), f"{name} is {module.__file__}, not the wheel's"
import timm, timm_gac
assert timm_gac.__version__ == importlib.metadata.version("timm-gac"), timm_gac.__version__
network = timm.create_model("test_gac_msresnet", num_classes=3)
import torch
assert network(torch.randn(1, 3, 16, 16)).shape == (1, 3)
"""
# All that is importable after `pip install timm-gac`, without extras.
IMPORTED = (
    "timm_gac",
    "timm_gac.cli",
    "timm_gac.data",
    "timm_gac.energy",
    "timm_gac.export",
    "timm_gac.hub",
    "timm_gac.models",
    "timm_gac.train",
    "gac_kernels",
    "gac_kernels.backend",
    "gac_kernels.layers",
    "gac_kernels.reference",
    "gac_kernels.spec",
    "gac_kernels.tuning",
)


def check_contents(wheel: zipfile.ZipFile) -> int:
    """Compare the wheel's files with the source folders.

    Returns:
        Number of files.

    Raises:
        ValueError: A file is missing, or one is there that is no part of the packages.
    """
    expected = {
        f"{name}/{path.relative_to(folder).as_posix()}"
        for name, folder in SOURCES.items()
        for path in folder.rglob("*")
        if path.is_file() and path.suffix in (".py", ".json", ".typed", ".c")
    }
    found = {name for name in wheel.namelist() if not PurePosixPath(name).parts[0].endswith(".dist-info")}
    if found != expected:
        raise ValueError(
            f"expected the files of {', '.join(SOURCES)} in the wheel, got {sorted(found - expected)} too many and "
            f"{sorted(expected - found)} missing: see [tool.setuptools] in pyproject.toml"
        )
    return len(found)


def imported_names(source: str) -> Iterator[str]:
    """Top-level names of the packages that a module imports anywhere in it, its own package left out."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            yield node.module.partition(".")[0]


def declared(wheel: zipfile.ZipFile) -> tuple[set[str], set[str]]:
    """Distributions that the wheel needs always, and those that one of `USER_EXTRAS` adds."""
    metadata = next(name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    lines = message_from_bytes(wheel.read(metadata)).get_all("Requires-Dist") or []
    always, optional = set(), set()
    for requirement in map(Requirement, lines):
        name, marker = canonicalize_name(requirement.name), requirement.marker
        if marker is None or marker.evaluate({"extra": ""}):
            always.add(name)
        elif any(extra in str(marker) for extra in USER_EXTRAS):
            optional.add(name)
    return always, optional - {"timm-gac"}


def check_requirements(wheel: zipfile.ZipFile) -> set[str]:
    """Compare what the wheel's modules import with what it declares.

    Returns:
        The import names of optional packages.

    Raises:
        ValueError: An import is not declared, or something is declared that nothing imports.
    """
    installed = packages_distributions()
    names = {
        name for file in wheel.namelist() if file.endswith(".py") for name in imported_names(wheel.read(file).decode())
    }
    names -= {*sys.stdlib_module_names, *SOURCES, *UNDECLARED, "_typeshed"}
    distributions = {
        name: canonicalize_name(DISTRIBUTIONS.get(name) or next(iter(installed.get(name, [name])))) for name in names
    }
    always, optional = declared(wheel)
    missing = sorted(set(distributions.values()) - always - optional)
    unused = sorted((always | optional) - set(distributions.values()) - set(UNIMPORTED))
    if missing or unused:
        raise ValueError(
            f"expected Requires-Dist to be what the code imports, got {missing} imported but not declared and {unused} "
            "declared but not imported: correct pyproject.toml"
        )
    return {name for name, distribution in distributions.items() if distribution not in always}


def link_packages(folder: Path, left_out: set[str]) -> None:
    """Fill a folder with links to all that is installed in this environment, but for these packages."""
    folder.mkdir()
    for path in Path(sysconfig.get_path("purelib")).iterdir():
        if path.name.partition(".")[0] not in left_out:
            (folder / path.name).symlink_to(path)


def check_install(wheel: Path, optional: set[str]) -> None:
    """Install the wheel alone in a fresh environment, import it and run its command line.

    Raises:
        ValueError: One of these fails; the message ends with what it printed.
    """
    with tempfile.TemporaryDirectory(prefix="timm-gac-wheel-") as scratch:
        folder = Path(scratch).resolve() / "venv"
        venv.create(folder, with_pip=False)
        variables = {"base": str(folder), "platbase": str(folder)}
        site = Path(sysconfig.get_path("purelib", "venv", variables))
        python, script = folder / "bin" / "python", folder / "bin" / "timm-gac"
        pip = [sys.executable, "-m", "pip", "--python", str(python), "--disable-pip-version-check", "--quiet"]
        run([*pip, "install", "--no-deps", "--no-index", str(wheel)], scratch)
        # After the install, so that pip does not take the editable timm-gac of the other environment for this one.
        link_packages(Path(scratch, "packages"), optional)
        (site / "requirements.pth").write_text(f"{scratch}/packages\n", encoding="utf-8")
        run([str(python), "-I", "-c", CHILD, str(site), ",".join(IMPORTED)], scratch)
        if "gac_msresnet18" not in run([str(script), "models"], scratch):
            raise ValueError(
                "expected `timm-gac models` of the installed wheel to list gac_msresnet18, got no such line"
            )
        run([str(script), "--help"], scratch)


def run(command: list[str], folder: str) -> str:
    """What a command prints when run in a folder outside of the checkout.

    Raises:
        ValueError: It fails.
    """
    environment = {"PATH": "/usr/bin:/bin", "HOME": folder, "COLUMNS": "200"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    if done.returncode:
        shown = " ".join(command[:4])
        raise ValueError(f"expected `{shown} ...` to succeed, got status {done.returncode}: {done.stderr[-2000:]}")
    return done.stdout


def check_same(first: Path, second: Path) -> None:
    """Compare two wheels file by file, such as one built from the checkout and one from the source distribution.

    Raises:
        ValueError: They differ.
    """
    contents = []
    for path in (first, second):
        with zipfile.ZipFile(path) as wheel:
            contents.append({name: wheel.read(name) for name in wheel.namelist() if not name.endswith("/RECORD")})
    names = contents[0].keys() | contents[1].keys()
    different = sorted(name for name in names if contents[0].get(name) != contents[1].get(name))
    if different:
        raise ValueError(f"expected equal wheels, got {different} different in {first} and {second}: see MANIFEST.in")


def only_wheel(folder: Path) -> Path:
    """The wheel in a folder.

    Raises:
        ValueError: There is none, or more than one.
    """
    found = sorted(folder.glob("*.whl"))
    if len(found) != 1:
        raise ValueError(f"expected one wheel in {str(folder)!r}, got {len(found)}: build into an empty folder")
    return found[0]


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description="Check a built wheel: contents, requirements, import.")
    parser.add_argument("folder", type=Path, help="folder with one wheel")
    parser.add_argument("--same-as", type=Path, help="folder with a wheel that has to be equal")
    options = parser.parse_args()
    try:
        path = only_wheel(options.folder)
        with zipfile.ZipFile(path) as wheel:
            count = check_contents(wheel)
            optional = check_requirements(wheel)
        check_install(path.resolve(), optional)
        if options.same_as is not None:
            check_same(path, only_wheel(options.same_as))
    except ValueError as error:
        sys.stderr.write(f"check_wheel.py: {error}\n")
        return 1
    print(f"{path.name}: {count} files, requirements as imported, runs without {', '.join(sorted(optional))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
