"""Converting published checkpoints: equal logits after a reload, and one clear sentence for every bad file."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from torch import Tensor

from timm_gac.hub import convert_checkpoint, infer_model, read_checkpoint, save_model_folder
from timm_gac.models.published import NETWORKS, PublishedNet


def network(name: str, num_classes: int = 10, num_steps: int = 4, in_chans: int = 3) -> PublishedNet:
    """A published network whose statistics are not the initial ones."""
    torch.manual_seed(0)
    net = PublishedNet(name, num_classes, num_steps, in_chans)
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.uniform_(module.running_var, 0.5, 2.0)
    return net.eval()


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    """The state dict of a CIFAR network."""
    return network("gac_msresnet18_cifar").state_dict()


@pytest.fixture(scope="module")
def checkpoint(tensors: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, as a DataParallel training script writes it."""
    file = tmp_path_factory.mktemp("checkpoint") / "model_best.pth.tar"
    torch.save({"epoch": 1, "state_dict": {f"module.{name}": tensor for name, tensor in tensors.items()}}, file)
    return file


def config(folder: Path) -> dict[str, Any]:
    """The folder's config.json."""
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize(
    ("name", "num_classes", "num_steps", "in_chans", "size", "dtype", "suffix"),
    [
        ("gac_msresnet18_cifar", 100, 6, 3, 12, torch.float32, ".pth"),
        ("msresnet18_cifar", 10, 4, 3, 12, torch.float32, ".pt"),
        ("gac_msresnet18", 7, 2, 2, 33, torch.float64, ".safetensors"),
        ("gac_msresnet34", 5, 4, 3, 33, torch.float32, ".pth"),
    ],
)
def test_converted_folder_reloads_with_equal_logits(
    name: str,
    num_classes: int,
    num_steps: int,
    in_chans: int,
    size: int,
    dtype: torch.dtype,
    suffix: str,
    tmp_path: Path,
) -> None:
    net = network(name, num_classes, num_steps, in_chans).to(dtype)
    file = tmp_path / f"published{suffix}"
    if suffix == ".safetensors":  # which cannot share tensors between names
        safetensors.torch.save_file({n: t.clone() for n, t in net.state_dict().items()}, file)
    else:
        torch.save(net.state_dict(), file)
    folder = convert_checkpoint(file, tmp_path / "folder")

    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    model_args = {"num_steps": num_steps} | ({} if in_chans == 3 else {"in_chans": in_chans})
    assert config(folder)["architecture"] == name
    assert config(folder)["num_classes"] == num_classes
    assert config(folder)["dtype"] == "float32"  # also of weights stored as float64: what timm computes in
    assert config(folder)["model_args"] == model_args
    stored = safetensors.torch.load_file(folder / "model.safetensors")
    assert {t.dtype for t in stored.values() if t.is_floating_point()} == {dtype}

    images = torch.randn(2, in_chans, size, size, dtype=torch.float64)
    fast = timm.create_model(f"local-dir:{folder}", pretrained=True, dtype=torch.float64).eval()
    with torch.no_grad():
        torch.testing.assert_close(fast(images), net.double()(images), rtol=0, atol=1e-9)
    single = timm.create_model(f"local-dir:{folder}", pretrained=True)
    assert next(single.parameters()).dtype == torch.float32


def test_prefixed_and_nested_checkpoint(checkpoint: Path, tensors: dict[str, Tensor], tmp_path: Path) -> None:
    folder = convert_checkpoint(checkpoint, tmp_path / "deep" / "folder")
    stored = safetensors.torch.load_file(folder / "model.safetensors")
    assert torch.equal(stored["conv1.weight"], tensors["conv1.weight"])
    assert torch.equal(stored["fc.weight"], tensors["fc1_s.layer.module.weight"])


def test_other_number_of_steps_resamples_the_temporal_attention(checkpoint: Path, tmp_path: Path) -> None:
    folder = convert_checkpoint(checkpoint, tmp_path / "folder", num_steps=6)
    assert config(folder)["model_args"] == {"num_steps": 6}
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert model.num_steps == 6
    assert torch.isfinite(model(torch.randn(1, 3, 8, 8))).all()


def test_full_folder_is_kept_unless_told(checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "README.md").write_text("mine")
    (folder / "model.safetensors").write_text("old")
    with pytest.raises(ValueError, match="expected a new or empty folder, got"):
        convert_checkpoint(checkpoint, folder)
    assert (folder / "model.safetensors").read_text() == "old"
    convert_checkpoint(checkpoint, folder, overwrite=True)
    assert (folder / "README.md").read_text() == "mine"
    assert len(safetensors.torch.load_file(folder / "model.safetensors")) > 100
    with pytest.raises(ValueError, match="expected a folder to write to, got the file"):
        convert_checkpoint(checkpoint, folder / "README.md", overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder"]


def test_failed_conversion_leaves_nothing(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    file = tmp_path / "wrong.pth"
    wrong = dict.fromkeys(("layer1.0.conv1.weight", "layer1.0.conv1_s.layer.module.weight"), torch.zeros(1, 1, 3, 3))
    torch.save({**tensors, **wrong}, file)
    with pytest.raises(ValueError, match=r"expected the tensors of gac_msresnet18_cifar, got others in 'wrong.pth'"):
        convert_checkpoint(file, tmp_path / "folder")
    torch.save({**tensors, "conv1_s.layer.module.weight": tensors["conv1.weight"] + 1}, file)
    with pytest.raises(ValueError, match=r"expected one value of 'conv1\.weight', got two under"):
        convert_checkpoint(file, tmp_path / "folder")
    assert [path.name for path in tmp_path.iterdir()] == ["wrong.pth"]


class Hostile:
    """Unpickles by calling a function: here, one that makes a file."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.trace,)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("plain_pickle", [False, True])
def test_code_in_a_pickle_is_not_run(plain_pickle: bool, nested: bool, tmp_path: Path) -> None:
    trace, file = tmp_path / "trace", tmp_path / "hostile.pth"
    content = {"state_dict": {"conv1.weight": torch.zeros(1)}, "args": Hostile(trace)} if nested else Hostile(trace)
    if plain_pickle:
        file.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, file)
    with pytest.raises(ValueError, match="cannot be read without running code in it"):
        convert_checkpoint(file, tmp_path / "folder")
    assert not trace.exists()
    assert not (tmp_path / "folder").exists()
    torch.load(file, weights_only=False) if not plain_pickle else pickle.loads(file.read_bytes())
    assert trace.exists(), "the file was not hostile: this test would prove nothing"


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize(
    "content", [b"", b"no checkpoint", b"PK\x03\x04 cut short", b"\x80\x02}q\x00(", bytes(range(256))]
)
def test_unreadable_bytes(content: bytes, suffix: str, tmp_path: Path) -> None:
    file = tmp_path / f"damaged{suffix}"
    file.write_bytes(content)
    with pytest.raises(ValueError, match="expected a file of tensors, got 'damaged"):
        read_checkpoint(file)


def test_cut_short_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "cut.pth.tar"
    file.write_bytes(checkpoint.read_bytes()[:100_000])
    with pytest.raises(ValueError, match="damaged"):
        convert_checkpoint(file, tmp_path / "folder")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.zeros(1)], "expected a state dict, got list"),
        ({}, "expected a state dict"),
        ({"epoch": 3, "lr": 0.1}, "expected tensors by name, got a non-tensor under 'epoch'"),
        ({"layer1.0.conv1.weight": torch.zeros(64, 64, 3, 3)}, "expected the tensor names of a published network"),
    ],
)
def test_foreign_content(content: Any, message: str, tmp_path: Path) -> None:
    file = tmp_path / "foreign.pth"
    torch.save(content, file)
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(file, tmp_path / "folder")


def test_wrong_arguments(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected a checkpoint file, got"):
        convert_checkpoint(tmp_path / "none.pth", tmp_path / "folder")
    with pytest.raises(ValueError, match="expected a model of this package, got 'resnet18'"):
        convert_checkpoint(checkpoint, tmp_path / "folder", model="resnet18")
    with pytest.raises(ValueError, match="expected num_classes=10 as in the file's head, got 100"):
        convert_checkpoint(checkpoint, tmp_path / "folder", num_classes=100)
    with pytest.raises(ValueError, match="expected the tensors of gac_msresnet34, got others"):
        convert_checkpoint(checkpoint, tmp_path / "folder", model="gac_msresnet34")


@pytest.mark.parametrize("base", NETWORKS)
def test_names_tell_the_model(base: str) -> None:
    for name in (base, f"gac_{base}"):
        with torch.device("meta"):
            assert infer_model(PublishedNet(name).state_dict()) == name


def test_all_who_may_read_the_config_may_read_the_weights(tmp_path: Path) -> None:
    folder = save_model_folder(timm.create_model("test_gac_msresnet"), tmp_path / "model")
    assert (folder / "model.safetensors").stat().st_mode == (folder / "config.json").stat().st_mode


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensor: tensor.to(torch.complex64), "of torch.complex64 in"),
        (lambda tensor: tensor.to(torch.int32), "of torch.int32 in"),
        (lambda tensor: tensor.to(torch.float8_e4m3fn), "of torch.float8_e4m3fn in"),
        (lambda tensor: tensor.to("meta"), "without values in"),
        (lambda tensor: tensor.to_sparse(), "in the layout torch.sparse_coo in"),
    ],
    ids=["complex", "integers", "float8", "meta", "sparse"],
)
def test_values_that_a_network_cannot_hold_are_refused(change: Any, message: str, tmp_path: Path) -> None:
    state = timm.create_model("test_gac_msresnet").state_dict()
    torch.save(state | {"fc.weight": change(state["fc.weight"])}, tmp_path / "file.pth")
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(tmp_path / "file.pth", tmp_path / "folder", model="test_gac_msresnet")
    assert not (tmp_path / "folder").exists()


def test_a_file_is_read_by_its_content_whatever_its_name(tmp_path: Path) -> None:
    state = timm.create_model("test_gac_msresnet").state_dict()
    for name in ("file.pth", "FILE.SAFETENSORS"):
        safetensors.torch.save_file(state, tmp_path / name)
        assert read_checkpoint(tmp_path / name).keys() == state.keys()
    torch.save(state, tmp_path / "pickle.safetensors")
    assert read_checkpoint(tmp_path / "pickle.safetensors").keys() == state.keys()


def test_an_empty_wrapper_is_skipped_and_an_empty_file_says_so(tmp_path: Path) -> None:
    state = timm.create_model("test_gac_msresnet").state_dict()
    torch.save({"state_dict_ema": {}, "state_dict": state}, tmp_path / "file.pth")
    assert read_checkpoint(tmp_path / "file.pth").keys() == state.keys()
    torch.save({}, tmp_path / "empty.pth")
    with pytest.raises(ValueError, match="got an empty one"):
        read_checkpoint(tmp_path / "empty.pth")


def test_no_steps_and_no_head_are_not_replaced_by_others(tmp_path: Path) -> None:
    state = timm.create_model("test_gac_msresnet").state_dict()
    torch.save(state, tmp_path / "file.pth")
    with pytest.raises(ValueError, match="num_steps as an integer from 1 to 1,024, got 0"):
        convert_checkpoint(tmp_path / "file.pth", tmp_path / "folder", model="test_gac_msresnet", num_steps=0)
    torch.save({name: tensor for name, tensor in state.items() if not name.startswith("fc.")}, tmp_path / "body.pth")
    with pytest.raises(ValueError, match="give num_classes=0"):
        convert_checkpoint(tmp_path / "body.pth", tmp_path / "folder", model="test_gac_msresnet")
    convert_checkpoint(tmp_path / "body.pth", tmp_path / "folder", model="test_gac_msresnet", num_classes=0)
    assert timm.create_model(f"local-dir:{tmp_path / 'folder'}", pretrained=True).num_classes == 0


def test_two_types_of_16_bits_are_stored_in_one_that_holds_both(tmp_path: Path) -> None:
    state = {name: tensor.bfloat16() for name, tensor in timm.create_model("test_gac_msresnet").state_dict().items()}
    state |= {"fc.bias": torch.full((100,), 1.0009765625, dtype=torch.float16)}  # bfloat16 would round it to 1
    state |= {"fc.weight": torch.full((100, 48), 1e30, dtype=torch.bfloat16)}  # float16 would overflow
    state = {name: tensor.long() if name.endswith("tracked") else tensor for name, tensor in state.items()}
    torch.save(state, tmp_path / "file.pth")
    folder = convert_checkpoint(tmp_path / "file.pth", tmp_path / "folder", model="test_gac_msresnet")
    stored = safetensors.torch.load_file(folder / "model.safetensors")
    assert all(torch.equal(stored[name].double(), state[name].double()) for name in ("fc.bias", "fc.weight"))
