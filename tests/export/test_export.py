""".pt2 files in a process with PyTorch alone; the command and its report, and what both refuse."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn

import timm_gac.export
from export_networks import images, network, small_network
from timm_gac import cli, fuse_for_inference, quantize
from timm_gac.export import compile_package, write_onnx, write_program
from timm_gac.export.report import compare
from timm_gac.hub import save_quantized

PICTURES = Path(__file__).parents[2] / "examples" / "pictures"


# In a process without this package: loads each program and compares it with what the network gave.
CHILD = """
import importlib.abc, sys, torch

class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("timm_gac", "gac_kernels", "timm"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Missing())
for file in sys.argv[1:]:
    program = torch.export.load(file).module()
    for x, expected in torch.load(file + ".expected", weights_only=True):
        found = program(x)
        assert torch.equal(found, expected), (file, (found - expected).abs().max())
        print(file, len(x))
"""


@torch.no_grad()
def test_programs_give_the_same_bits_in_a_process_without_this_package(tmp_path: Path) -> None:
    model, steps = small_network(), 2
    cases = {
        "float": (model, {}),
        "folded": (fuse_for_inference(copy.deepcopy(model)), {"frames": True}),
        "int8": (quantize(model), {"per_step": True}),
        "static": (model, {"batch_size": 3}),
    }
    files = []
    for name, (changed, options) in cases.items():
        files.append(str(tmp_path / f"{name}.pt2"))
        frames = [steps] if "frames" in options else []
        report = write_program(changed, files[-1], images=images(2, *frames), **options)
        assert report.largest_difference == 0 and report.flips == 0
        compute = changed.forward_steps if "per_step" in options else changed
        batches = [images(n, *frames) for n in ([3] if name == "static" else [1, 5])]
        assert compute(batches[0]).std() > 1e-3
        torch.save([(x, compute(x)) for x in batches], files[-1] + ".expected")
    done = subprocess.run([sys.executable, "-c", CHILD, *files], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 7


@pytest.mark.parametrize(
    ("moved", "exact", "said"),
    [
        (
            0.33,
            False,
            "by up to 0.33 (sums in another order: where rounding flips a spike, logits move), 0 of 8 answers",
        ),
        (0.33, True, "by up to 0.33, 0 of 8 answers"),  # of such a format it would be a defect
        (6e-8, False, "by up to 6e-08, 0 of 8 answers"),
        (float("inf"), False, "by up to inf, 0 of 8 answers"),
    ],
)
def test_report_says_where_differences_come_from(moved: float, exact: bool, said: str) -> None:
    logits = torch.eye(8, dtype=torch.float64)
    run = lambda images: logits + torch.where(logits == 1, moved, 0.0)  # noqa: E731
    assert said in str(compare(Path("a"), "", nn.Identity(), logits, run, None, exact))


def test_command_writes_what_a_folder_holds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_quantized(network(), tmp_path / "int8")
    out = tmp_path / "a.pt2"
    assert cli.main(["export", str(tmp_path / "int8"), str(out), "--data", str(PICTURES), "--images", "3"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert f"wrote {out}" in text and "weights of int8" in text
    assert "logits differ by up to 0, 0 of 1 answers differ" in text
    before = out.read_bytes()
    assert cli.main(["export", str(tmp_path / "int8"), str(out)]) == 2
    assert "--overwrite" in capsys.readouterr().err and out.read_bytes() == before


def test_command_says_when_a_file_answers_otherwise(
    needs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    needs("onnxruntime")
    monkeypatch.setattr(timm_gac.export.onnx, "_serialised", other_network)
    assert cli.main(["export", "test_gac_msresnet", str(tmp_path / "a.onnx")]) == 1
    text = " ".join(capsys.readouterr().out.split())
    assert "weights random (seed 0), batch-norm statistics of these images" in text
    assert "logits differ by up to inf" in text


def other_network(*_: object) -> bytes:
    """An ONNX file whose logits are NaN."""
    from onnx import TensorProto, helper

    nan = helper.make_tensor("nan", TensorProto.FLOAT, [100], [float("nan")] * 100)
    logits = [
        helper.make_node("ReduceMean", ["images"], ["mean"], keepdims=1, axes=[1, 2, 3]),
        helper.make_node("Flatten", ["mean"], ["row"]),
        helper.make_node("Mul", ["row", "nan"], ["logits"]),
    ]
    image = helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", 3, "h", "w"])
    output = helper.make_tensor_value_info("logits", TensorProto.FLOAT, None)
    graph = helper.make_graph(logits, "other", [image], [output], [nan])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9).SerializeToString()


@pytest.mark.parametrize(
    ("ci", "python", "outcome"),
    [
        ("1", (3, 10), pytest.skip.Exception),
        ("1", (3, 11), pytest.fail.Exception),
        ("", (3, 12), pytest.skip.Exception),
    ],
)
def test_a_missing_reader_fails_in_ci_where_it_exists(
    needs, ci: str, python: tuple[int, int], outcome: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CI", ci)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("sys.version_info", python)
    with pytest.raises(outcome, match="spikingjelly"):
        needs("spikingjelly.activation_based.neuron")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a.tflite"], "expected OUT to end in .nir or .onnx or .pt2"),
        (["a.onnx", "--compiled"], "expected no --compiled for a .onnx file"),
        (["a.nir", "--batch-size", "2"], "expected no --batch-size for a .nir file"),
        (["a.onnx", "--dtype", "bfloat16"], "expected --dtype float32 or float64 for a .onnx file, got bfloat16"),
        (["a.nir", "--device", "cuda"], "expected no --device for a .nir file, got 'cuda'"),
        (["a.onnx", "--opset", "9"], "expected an opset from 20 to 23"),
        (["a.pt2", "--data", "digits", "--frames"], "expected --frames without --data"),
    ],
)
def test_command_refuses_what_a_format_cannot_do(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["export", "test_gac_msresnet", *arguments]) == 2
    error = capfd.readouterr().err
    assert message in error and len(error.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_a_missing_package_is_named_with_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    from timm_gac.cli import output

    find = output.importlib.util.find_spec
    monkeypatch.setattr(output.importlib.util, "find_spec", lambda name: None if name == "onnxscript" else find(name))
    assert cli.main(["export", "test_gac_msresnet", str(tmp_path / "a.onnx")]) == 2
    assert 'pip install "timm-gac[export]"' in capsys.readouterr().err


def test_functions_refuse_files_that_are_there_and_other_dtypes(tmp_path: Path, monkeypatch) -> None:
    (path := tmp_path / "a").write_text("mine")
    for write in (write_onnx, write_program, compile_package):
        with pytest.raises(ValueError, match=r"expected a new file, got .*overwrite=True"):
            write(network(), path)
    assert path.read_text() == "mine"
    with pytest.raises(ValueError, match="expected a file, got the folder"):
        write_program(network(), tmp_path, overwrite=True)
    with pytest.raises(ValueError, match=r"float32 or float64, got torch.float16"):
        write_onnx(network().half(), tmp_path / "b")
    model = network()
    model.pretrained_cfg = {}
    with pytest.raises(ValueError, match="give images"):
        write_program(model, tmp_path / "b")
    for write in (write_onnx, write_program, timm_gac.export.write_nir):
        with pytest.raises(ValueError, match="at least 1 image"):
            write(network(), tmp_path / "b", images=images(0))
        with pytest.raises(ValueError, match=r"expected images \(B, 3, H, W\) .* got \(2, 1, 16, 16\)"):
            write(network(), tmp_path / "b", images=images(2)[:, :1])
        with pytest.raises(ValueError, match="expected a spiking network of this package, got Linear"):
            write(nn.Linear(3, 3), tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_a_network_is_as_before_and_in_its_own_channels(tmp_path: Path) -> None:
    model = timm.create_model("test_gac_msresnet", num_classes=7, num_steps=2, in_chans=1).eval()
    assert write_program(model, tmp_path / "a.pt2").largest_difference == 0  # noise of one channel
    norm = copy.deepcopy(model).layer1[0].bn1.norm  # a copy fails where tracing left fake tensors in it
    assert type(norm.running_mean) is Tensor
    assert model.layer1[0].bn1.norm.weight is model.layer1[0].bn1.weight
    model.set_int8_convs()
    with pytest.raises(ValueError, match=r"fold a copy with timm_gac\.fuse_for_inference"):
        write_program(model, tmp_path / "b.pt2")
    assert write_program(fuse_for_inference(model), tmp_path / "b.pt2").largest_difference == 0
