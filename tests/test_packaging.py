"""The package as a whole: layers, import time, imports without Triton, no pickles."""

from __future__ import annotations

import ast
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted([*(ROOT / "timm_gac").rglob("*.py"), *(ROOT / "kernels/torch-ext/gac_kernels").rglob("*.py")])
# Each layer may import those before it, never those after it.
LAYERS = [
    {"gac_kernels"},
    {"timm_gac.neuron"},
    {"timm_gac.encoder"},
    {"timm_gac.models"},
    {"timm_gac.hub", "timm_gac.bench_harness", "timm_gac.bench_ops", "timm_gac.benchmark", "timm_gac.demo"},
    {"timm_gac.cli"},
]


def layer_of(module: str) -> int | None:
    """Index of the layer that holds ``module``; None for what is no module of ours."""
    for index, names in enumerate(LAYERS):
        if any(module == name or module.startswith(f"{name}.") for name in names):
            return index
    return None


def module_name(path: Path) -> str:
    base = ROOT / "kernels/torch-ext" if "gac_kernels" in path.parts else ROOT
    return ".".join(path.relative_to(base).with_suffix("").parts).removesuffix(".__init__")


def imports_of(path: Path) -> set[str]:
    """Absolute names of everything ``path`` imports, at any depth."""
    name = module_name(path)
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parts, *([node.module] if node.module else [])])
            found |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_layers_point_one_way(path):
    own = layer_of(module_name(path))
    imported = imports_of(path)
    if own is not None:
        above = sorted(i for i in imported if (layer_of(i) or 0) > own)
        assert not above, f"{module_name(path)} imports from a layer above it: {above}"
    if "gac_kernels" in path.parts:
        assert not any(i.split(".")[0] in ("timm", "timm_gac") for i in imported)


def test_every_module_has_a_layer():
    homeless = [m for m in map(module_name, SOURCES) if m != "timm_gac" and layer_of(m) is None]
    assert not homeless, f"give these a place in LAYERS: {homeless}"


def test_pickles_are_read_with_weights_only():
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                flags = {k.arg: ast.unparse(k.value) for k in node.keywords}
                assert flags.get("weights_only") == "True", f"{path.name}:{node.lineno}"
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.save", "pickle.dump", "pickle.load"):
                raise AssertionError(f"{path.name}:{node.lineno} reads or writes a pickle")


def test_no_folder_shadows_a_package():
    for name in ("kernels/__init__.py", "tests/kernels", "tests/gac_kernels"):
        assert not (ROOT / name).exists()


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=240).stdout


def test_import_is_quick():
    """Under one second beyond `import timm`, median of three."""
    code = "import time, timm; t = time.perf_counter(); import timm_gac; print(time.perf_counter() - t)"
    assert statistics.median(float(run(code)) for _ in range(3)) < 1.0


def test_models_work_without_triton():
    code = """
import sys
sys.modules["triton"] = None
import torch, timm, timm_gac
model = timm.create_model("test_gac_msresnet").eval()
size = model.default_cfg["input_size"]
x = torch.randn(2, *size)
torch.testing.assert_close(model(x), model.forward_steps(x).mean(1))
print(model(x).isfinite().all().item())
"""
    assert run(code).strip().endswith("True")
