"""The kernel project: staged variants load beside the wheel's copy, under the real client too, and compute the same."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType

import pytest
import torch

import gac_kernels
import timm_gac

ROOT = Path(__file__).resolve().parents[2]
REPO = "timm-gac/gac-kernels"


def load(name: str, file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


stage_module = load("stage_gac_kernels", ROOT / "kernels" / "stage.py")


@pytest.fixture(scope="module")
def staged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stage_module.stage(tmp_path_factory.mktemp("kernel") / "gac-kernels")


@pytest.fixture(scope="module")
def other_build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same project with one more comment: a build whose operators have another namespace again."""
    folder = tmp_path_factory.mktemp("other")
    shutil.copytree(ROOT / "kernels", folder / "kernels", ignore=shutil.ignore_patterns("__pycache__", "benchmarks"))
    with (folder / "kernels/torch-ext/gac_kernels/spec.py").open("a") as file:
        file.write("# another build\n")
    return stage_module.stage(folder / "gac-kernels", folder / "kernels")


def assert_equals_the_wheel(kernel: ModuleType) -> None:
    """Spikes and gradients of each op, bit for bit, with the copy's own LIFSpec."""
    x = torch.randn(4, 2, 3, 5, 7, requires_grad=True)
    stem, spatial = (torch.randn(2, 3, 5, 7, requires_grad=True) for _ in range(2))
    temporal = torch.randn(2, 4, requires_grad=True)
    for spec in ("CIFAR", "IMAGENET"):
        for op, inputs in (("lif", (x,)), ("gac_encode", (stem, spatial, temporal))):
            ours = getattr(gac_kernels, op)(*inputs, getattr(gac_kernels, spec))
            theirs = getattr(kernel, op)(*inputs, getattr(kernel, spec))
            assert torch.equal(ours, theirs), (op, spec)
            weight = torch.randn_like(ours)
            for mine, other in zip(
                torch.autograd.grad((ours * weight).sum(), inputs),
                torch.autograd.grad((theirs * weight).sum(), inputs),
                strict=True,
            ):
                assert torch.equal(mine, other), (op, spec)


@pytest.mark.parametrize("backend", ["cpu", "cuda"])
def test_a_variant_is_a_package_with_a_namespace_of_its_own(backend: str, other_build: Path) -> None:
    variant = other_build / "build" / f"torch-{backend}"
    metadata = json.loads((variant / "metadata.json").read_text())
    assert metadata["name"] == "gac-kernels" and metadata["backend"] == {"type": backend}
    assert metadata["id"].startswith(f"_gac_kernels_{backend}_")
    kernel = load(metadata["id"], variant / "__init__.py")
    assert kernel.lif is not gac_kernels.lif
    assert hasattr(getattr(torch.ops, metadata["id"]), "lif")
    assert_equals_the_wheel(kernel)


def test_staged_folder_holds_sources_and_card(staged: Path) -> None:
    assert sorted(path.name for path in staged.iterdir()) == ["README.md", "build", "build.toml", "torch-ext"]
    assert (staged / "README.md").read_text().startswith("---\nlibrary_name: kernels")
    sources = {name for name in stage_module.source_files() if name.endswith(".py")}
    assert "neuron/lif.py" in sources  # packages in the package too
    for folder in ("build/torch-cpu", "build/torch-cuda", "torch-ext/gac_kernels"):
        found = (staged / folder).rglob("*.py")
        assert {path.relative_to(staged / folder).as_posix() for path in found} == sources
        assert (staged / folder / "configs").is_dir()
        assert not list((staged / folder).rglob("__pycache__"))


def test_staging_again_replaces_and_foreign_folders_stay(staged: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(staged, copy)
    (copy / "build" / "torch-cpu" / "old.py").write_text("")
    stage_module.stage(copy)
    assert not (copy / "build" / "torch-cpu" / "old.py").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="expected a new, an empty or a staged folder"):
        stage_module.stage(tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]


def test_the_namespace_changes_with_any_source() -> None:
    files = stage_module.source_files()
    other = {**files, "neuron/lif.py": files["neuron/lif.py"] + b"\n"}
    assert stage_module.source_hash(files) != stage_module.source_hash(other)


def test_renaming_misses_nothing() -> None:
    source = '"""About gac_kernels."""\nlib = Library("{0}", "DEF")  # of gac_kernels\nf = torch.ops.{0}.lif\n'
    renamed = stage_module.rename(source.format("gac_kernels"), "_x")
    assert renamed == source.format("_x")
    with pytest.raises(ValueError, match="got 'gac_kernels' in line 1"):
        stage_module.rename("import gac_kernels\n", "_x")
    with pytest.raises(ValueError, match="in line 2"):
        stage_module.rename('x = 1\nname = "gac_kernels"\n', "_x")


class TestRealClient:
    """With the Kernel Hub's own client, offline."""

    @pytest.fixture(autouse=True)
    def client(self) -> None:
        try:  # not importorskip: the repository's own folder kernels/ can be imported as a namespace package
            version("kernels")
        except PackageNotFoundError:
            pytest.skip("needs the Kernel Hub's client: pip install kernels")

    def test_project_is_valid_edition_5(self) -> None:
        from kernels._rust import Backend, Build

        assert "edition = 5" in (ROOT / "kernels" / "build.toml").read_text()
        assert Build.open(ROOT / "kernels").general.backends == [Backend.CPU, Backend.CUDA]

    @pytest.mark.parametrize("backend", ["cpu", "cuda"])
    def test_metadata_and_checksums(self, backend: str, staged: Path) -> None:
        from kernels._rust import Digest, Metadata

        variant = staged / "build" / f"torch-{backend}"
        metadata = Metadata.read_from_file(variant / "metadata.json")
        assert metadata.license == "Apache-2.0" and metadata.version == 1 and metadata.python_depends == []
        metadata.digest.validate(Digest.hash_variant(metadata.digest.algorithm, variant))

    def test_local_kernel(self, staged: Path) -> None:
        from kernels import get_local_kernel

        kernel = get_local_kernel(staged, backend="cpu")
        assert kernel.__name__.startswith("_gac_kernels_cpu_")
        assert_equals_the_wheel(kernel)

    def test_local_override_of_the_hub(self, staged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from kernels import get_kernel

        monkeypatch.setenv("LOCAL_KERNELS", f"{REPO}={staged}")
        assert_equals_the_wheel(get_kernel(REPO, version=1))

    @pytest.mark.skipif(not hasattr(gac_kernels, "layers"), reason="gac_kernels does not import its layers")
    def test_kernelize_replaces_the_neuron(self, staged: Path) -> None:
        import timm

        from kernels import LocalLayerRepository, Mode, kernelize, replace_kernel_forward_from_hub, use_kernel_mapping

        class Neuron(timm_gac.LIF):
            """A neuron of this test's own: the replacement marks the class for good."""

        replace_kernel_forward_from_hub(Neuron, "LIF")
        repository = LocalLayerRepository(staged, layer_name="LIF")
        model = timm.create_model("test_gac_msresnet", num_classes=3)
        images = torch.randn(2, 3, 16, 16)
        expected = model(images)
        expected.sum().backward()
        gradient = model.conv1.weight.grad.clone()
        model.zero_grad()
        model.lif = Neuron(model.spec, model.num_steps)
        with use_kernel_mapping({"LIF": {"cpu": repository}}):
            kernelize(model, mode=Mode.TRAINING | Mode.TORCH_COMPILE, device="cpu", use_fallback=False)
        assert model.lif.forward.__func__.__module__.startswith("_gac_kernels_")
        logits = model(images)
        logits.sum().backward()
        assert torch.equal(logits, expected) and torch.equal(model.conv1.weight.grad, gradient)
