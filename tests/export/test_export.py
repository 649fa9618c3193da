"""ONNX and .pt2 files: what ONNX Runtime, PyTorch alone and compiled code compute from them."""

from __future__ import annotations

import copy
import json
import os
import shutil
import struct
import subprocess
import sys
import zipfile
from collections import Counter
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn

import timm_gac.export
from gac_kernels.decompositions import decomposition_table, registered_decompositions
from timm_gac import cli, fuse_for_inference, quantize
from timm_gac.export import compile_package, inductor, write_onnx, write_program
from timm_gac.export.report import compare
from timm_gac.hub import calibrate, save_quantized

T = 3
PICTURES = Path(__file__).parents[2] / "examples" / "pictures"


def images(batch: int, *frames: int) -> Tensor:
    return torch.randn(batch, *frames, 3, 16, 16, generator=torch.Generator().manual_seed(batch))


def network(**kwargs: object) -> nn.Module:
    """A network whose neurons fire."""
    model = timm.create_model("test_gac_msresnet", **dict(num_classes=7, num_steps=T) | kwargs)
    calibrate(model, [images(8)])
    return model


def small_network() -> nn.Module:
    """Two steps and one block, for exporters take long: a stem, both kinds of stride and of padding, a shortcut."""
    return network(num_steps=2, layers=(0, 1, 0))


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


def run_onnx(needs, path: Path, x: Tensor) -> list[Tensor]:
    session = needs("onnxruntime").InferenceSession(path, providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    return [torch.from_numpy(y) for y in session.run(None, {given.name: x.numpy()})]


def nodes(needs, path: Path) -> Counter[str]:
    model = needs("onnx").load(path)
    assert {opset.domain for opset in model.opset_import} <= {""} and not model.functions
    return Counter(node.op_type for node in model.graph.node)


@torch.no_grad()
def test_onnx_runtime_answers_as_the_network(needs, tmp_path: Path) -> None:
    model, path = network(), tmp_path / "a.onnx"
    report = write_onnx(model, path, images=images(4), label_names=("ant", "bee"))
    assert report.flips == 0 and report.largest_difference < 1e-5 and report.images == 4
    assert "BatchNormalization" not in nodes(needs, path)  # folded into the convolutions
    for batch in (1, 5):
        (found,) = run_onnx(needs, path, images(batch))
        torch.testing.assert_close(found, model(images(batch)), rtol=0, atol=1e-5)
    about = {entry.key: entry.value for entry in needs("onnx").load(path).metadata_props}
    assert about["architecture"] == "test_gac_msresnet" and json.loads(about["label_names"]) == ["ant", "bee"]


@torch.no_grad()
def test_float64_frames_and_steps_in_onnx_runtime(needs, tmp_path: Path) -> None:
    # ONNX Runtime has no convolution in float64: they are matrix products, of every stride and padding here.
    model, path = small_network().double(), tmp_path / "a.onnx"
    report = write_onnx(model, path, images=images(2, 2).double(), per_step=True, opset=20)
    assert report.largest_difference < 1e-12 and report.flips == 0
    assert "Conv" not in nodes(needs, path)
    (found,) = run_onnx(needs, path, images(3, 2).double())
    torch.testing.assert_close(found, model.forward_steps(images(3, 2).double()), rtol=0, atol=1e-12)


class Inside(nn.Module):
    """Currents and spikes of all neurons of a network, from the gated current."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, gated: Tensor) -> list[Tensor]:
        membrane, spikes = gated, self.network.lif(gated)
        seen = [spikes]
        for stage in (self.network.layer1, self.network.layer2, self.network.layer3, self.network.layer4):
            for block in stage:
                seen.append(block.conv1(spikes))
                membrane, spikes, _ = block(membrane, spikes)
                seen += [membrane, spikes]
        return seen


@torch.no_grad()
def test_onnx_runtime_computes_the_same_integers_from_the_same_gated_current(needs, tmp_path: Path) -> None:
    model = quantize(network())
    gated = [model._encode(images(batch)) for batch in (2, 5)]
    shapes = ({0: T * torch.export.Dim("batch", min=1)},)
    program = torch.export.export(Inside(model).eval(), (gated[0],), dynamic_shapes=shapes)
    path = tmp_path / "inside.onnx"
    path.write_bytes(timm_gac.export.onnx._serialised(program.run_decompositions(decomposition_table()), 23, {}))
    for x in gated:
        expected, found = Inside(model)(x), run_onnx(needs, path, x)
        assert sum(int(spikes.sum()) for spikes in expected if spikes.dtype == torch.int8) > 1000
        for want, got in zip(expected, found, strict=True):
            assert torch.equal(got, want)
    stored = [entry for entry in needs("onnx").load(path).graph.initializer if entry.data_type == 3]  # int8
    assert len(stored) >= 3  # weights of the 3x3 convolutions; the exporter makes small ones float32


@torch.no_grad()
def test_timm_s_exporter_works_with_the_operators_registered(needs, tmp_path: Path) -> None:
    from timm.utils.onnx import onnx_export

    needs("onnxscript")
    model, path = small_network(), tmp_path / "a.onnx"
    with registered_decompositions():
        onnx_export(model, str(path), example_input=images(2), use_dynamo=True, input_names=["x"])
    (found,) = run_onnx(needs, path, images(2))
    torch.testing.assert_close(found, model(images(2)), rtol=0, atol=1e-5)


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
@torch.no_grad()
def test_a_compiled_package_answers_as_the_network(tmp_path: Path) -> None:
    # A compiler that would put a copy of the C++ standard library into the package, which then could not be loaded.
    compiler = tmp_path / "static-g++"
    compiler.write_text('#!/bin/sh\nexec g++ -static-libstdc++ "$@"\n')
    compiler.chmod(0o755)
    model = timm.create_model("test_gac_msresnet", num_classes=7, num_steps=1, layers=(1, 0, 0), channels=(4, 4, 4))
    calibrate(model, [images(8)])
    with torch._inductor.config.patch({"cpp.cxx": (None, str(compiler))}):
        report = compile_package(model, tmp_path / "a.pt2", images=images(4), batch_size=2)
    assert report.flips == 0 and report.largest_difference < 1e-5
    assert "generated code alone" in report.contents
    assert stack_flags(tmp_path / "a.pt2") == [6]  # readable and writable, not executable: glibc 2.41 refuses that


def stack_flags(package: Path) -> list[int]:
    """What a package's library wants of the stack: the flags of its ELF program header GNU_STACK."""
    with zipfile.ZipFile(package) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".so"))
        elf = archive.read(name)
    (start,) = struct.unpack_from("<Q", elf, 32)
    size, count = struct.unpack_from("<HH", elf, 54)
    headers = (struct.unpack_from("<II", elf, start + i * size) for i in range(count))
    return [flags for kind, flags in headers if kind == 0x6474E551]


CPP = Path(__file__).parents[2] / "examples" / "cpp" / "run_package.cpp"


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
@torch.no_grad()
def test_a_c_plus_plus_program_runs_a_compiled_package(tmp_path: Path) -> None:
    model = timm.create_model("test_gac_msresnet", num_classes=7, num_steps=1, layers=(1, 1, 1), channels=(4, 4, 4))
    calibrate(model, [images(8)])
    compile_package(model, tmp_path / "a.pt2", images=images(4))
    torch_folder, program = Path(torch.__file__).parent, tmp_path / "run_package"
    includes = [f"-I{torch_folder}/include", f"-I{torch_folder}/include/torch/csrc/api/include"]
    libraries = ["-Wl,--no-as-needed", f"-L{torch_folder}/lib", "-ltorch", "-ltorch_cpu", "-lc10"]
    where = f"-Wl,-rpath,{torch_folder}/lib"
    subprocess.run(["g++", "-std=c++20", *includes, CPP, "-o", program, *libraries, where], check=True)
    x = images(6)
    x.numpy().tofile(tmp_path / "images.bin")
    arguments = [tmp_path / "a.pt2", tmp_path / "images.bin", tmp_path / "logits.bin"]
    # Without the variables of this process, so that nothing of Python is found.
    environment = {"PATH": "/usr/bin:/bin", "TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    for batch in (1, 3):
        command = [program, *arguments, str(batch), "3", "16", "16"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout == "6 images, 7 classes\n"
        found = torch.frombuffer(bytearray((tmp_path / "logits.bin").read_bytes()), dtype=torch.float32).view(6, 7)
        torch.testing.assert_close(found, model(x), rtol=0, atol=1e-5)
    wrong = subprocess.run([program, *arguments, "4", "3", "16", "16"], env=environment, capture_output=True, text=True)
    assert wrong.returncode == 1 and "multiple of BATCH" in wrong.stderr


def test_compilers_for_a_gpu_find_the_triton_kernels() -> None:
    """Every operator of inference as launches of its kernel, which write what they should, with a free batch size."""
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(Path(__file__).with_name("embedding_child.py")), "float", "folded", "int8"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    before = [
        ["_pool_frames_kernel", ["partial_ptr"]],
        ["_pool_frames_finish_kernel", ["maximum_ptr", "mean_ptr", "ties_ptr"]],
        ["_pad_kernel", ["y_ptr"]],
        ["_pad_kernel", ["y_ptr"]],
        ["fire_fwd_kernel", ["s_ptr", "y_ptr"]],
    ]
    # Convolution and neuron of two blocks whose membrane is kept, and of the last one. The folded network was exported
    # on a CPU, where convolution and neuron are no single operator.
    kernels = {"float": "forward_kernel", "folded": "lif_fwd_kernel", "int8": "spike_conv_kernel"}
    for line, (kind, kernel) in zip(done.stdout.splitlines(), kernels.items(), strict=True):
        found = json.loads(line)
        assert found["left"] == 0 and found["free"], (kind, found)
        assert found["kernels"][:5] == before and found["kernels"][-1] == ["_firing_rate_kernel", ["y_ptr"]], kind
        assert [name for name, _ in found["kernels"][5:-1]] == [kernel] * 6
        for _, written in found["kernels"][5:-1]:
            assert "s_ptr" in written and set(written) <= {"s_ptr", "y_ptr"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("kind", "dtype"), [("folded", "float32"), ("folded", "bfloat16"), ("int8", "float32")])
@torch.no_grad()
def test_a_package_for_a_gpu_runs_without_this_package(kind: str, dtype: str, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = GPU_PACKAGE.format(kind=kind, dtype=dtype, folder=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    done = subprocess.run([sys.executable, "-c", CHILD_OF_PACKAGE, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    tolerance = {"float32": 1e-2, "bfloat16": 0.3}[dtype]  # a spike that rounding flips moves a logit so much
    assert float(done.stdout) <= tolerance


GPU_PACKAGE = """
import timm, timm_gac, timm_gac.export, timm_gac.hub, torch
torch.backends.cudnn.allow_tf32 = False
x = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))
model = timm.create_model("test_gac_msresnet", num_classes=7)
timm_gac.hub.calibrate(model, [x])
network = timm_gac.fuse_for_inference(model) if "{kind}" == "folded" else timm_gac.quantize(model)
network, x = network.to("cuda", torch.{dtype}), x.to("cuda", torch.{dtype})
report = timm_gac.export.compile_package(network, "{folder}/a.pt2", images=x)
assert "Triton kernels of gac_kernels" in report.contents
with torch.no_grad():
    torch.save([(x[:n], network(x[:n])) for n in (1, 3, 8)], "{folder}/pairs")
"""
CHILD_OF_PACKAGE = """
import importlib.abc, sys, torch

class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("timm_gac", "gac_kernels", "timm"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Missing())
torch.backends.cudnn.allow_tf32 = False  # as where the pairs were made
package = torch._inductor.aoti_load_package(sys.argv[1] + "/a.pt2")
pairs = torch.load(sys.argv[1] + "/pairs", weights_only=True)
print(max((package(x) - expected).abs().max().item() for x, expected in pairs))
"""


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


def test_a_package_that_crashes_leaves_this_process_alive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inductor, "_CHILD", "import os, signal\ninput()\nos.kill(os.getpid(), signal.SIGSEGV)")
    monkeypatch.setattr("torch._inductor.cpu_vec_isa.pick_vec_isa", lambda: "avx2")
    with inductor.PackageProcess(torch.device("cpu")) as run:
        run.package = tmp_path / "a.pt2"
        with pytest.raises(RuntimeError, match="package was not written: the process that ran it was ended by SIGSEGV"):
            run(torch.zeros(1, 3, 8, 8))
