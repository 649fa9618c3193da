"""What an install contains, what an import costs, and which layer may import which."""

from __future__ import annotations

import ast
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from warm import WarmPython

ROOT = Path(__file__).resolve().parents[1]
KERNELS = ROOT / "kernels" / "torch-ext" / "gac_kernels"
PACKAGE = ROOT / "timm_gac"

# What a file of the kernels may import from elsewhere; Triton is imported in one guarded place.
KERNEL_IMPORTS = {"torch", "triton", *sys.stdlib_module_names}


def sources(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.py"))


def source_paths() -> dict[str, str]:
    """The environment with this checkout's packages first."""
    paths = [str(ROOT), str(KERNELS.parent), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def test_rooms_import_from_rooms_below_them_and_nothing_in_circles() -> None:
    # The contracts stand in pyproject.toml. `exhaustive` there makes a folder without a place among the rooms an error.
    done = subprocess.run(
        [str(Path(sys.executable).with_name("lint-imports")), "--no-logo"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=source_paths(),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 kept, 0 broken" in done.stdout


@pytest.mark.parametrize("path", sources(KERNELS), ids=lambda path: path.relative_to(KERNELS).as_posix())
def test_kernels_import_only_torch_and_triton(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            assert {alias.name.split(".")[0] for alias in node.names} <= KERNEL_IMPORTS
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            assert node.module is not None and node.module.split(".")[0] in KERNEL_IMPORTS


@pytest.mark.parametrize("path", sources(ROOT / "kernels"), ids=lambda path: path.stem)
def test_the_kernel_project_stands_alone(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        assert "timm_gac" not in {name.split(".")[0] for name in names}


def test_pickles_are_only_read_as_weights() -> None:
    for path in [*sources(PACKAGE), *sources(ROOT / "kernels")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "pickle.load", "pickle.loads"):
                safe = [keyword.value for keyword in node.keywords if keyword.arg == "weights_only"]
                assert safe and ast.unparse(safe[0]) == "True", f"{path}:{node.lineno} may run code out of a file"


def test_no_folder_shadows_another_package() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "kernels" / "torch-ext" / "__init__.py").exists()
    assert not [
        path for path in (ROOT / "tests").rglob("*") if path.is_dir() and path.name in ("kernels", "gac_kernels")
    ]


@pytest.mark.parametrize("package", [PACKAGE, KERNELS], ids=lambda package: package.name)
def test_every_module_is_in_a_package_that_is_installed(package: Path) -> None:
    # pyproject.toml takes every package under these two; a folder without __init__.py would be left out.
    assert (
        f'include = ["{PACKAGE.name}", "{PACKAGE.name}.*", "{KERNELS.name}", "{KERNELS.name}.*"]'
        in (ROOT / "pyproject.toml").read_text()
    )
    for path in sources(package):
        for folder in (path.parent, *path.parent.parents):
            if folder == package.parent:
                break
            assert (folder / "__init__.py").is_file(), f"{folder} has modules and no __init__.py"


def run_python(code: str) -> str:
    environment = source_paths()
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_costs_under_a_second_beyond_timm(warm_python: WarmPython) -> None:
    # Processor time, not wall time: the tests beside this one must not count.
    code = "import timm, time; start = time.process_time(); import timm_gac; print(time.process_time() - start)"
    seconds = []
    for _ in range(3):
        done = warm_python(["-c", code], env=source_paths())
        assert done.returncode == 0, done.stderr
        seconds.append(float(done.stdout))
    assert statistics.median(seconds) < 1.0, seconds


def test_works_without_triton() -> None:
    code = """
import sys
class NoTriton:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            raise ModuleNotFoundError("No module named 'triton'", name="triton")
sys.meta_path.insert(0, NoTriton())
import timm, timm_gac, torch
model = timm.create_model("test_gac_msresnet", num_classes=3)
model(torch.randn(2, 3, 16, 16)).sum().backward()
assert all(parameter.grad is not None for parameter in model.parameters())
try:
    with timm_gac.use_backend("triton"):
        model(torch.randn(2, 3, 16, 16))
except ValueError as error:
    print(error)
"""
    assert "Triton" in run_python(code)
