"""Compiled packages: what AOTInductor's code computes, in Python, in C++ and for a GPU."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import timm
import torch

from export_networks import images
from timm_gac.export import compile_package, inductor
from timm_gac.hub import calibrate


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


def test_a_package_that_crashes_leaves_this_process_alive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inductor, "_CHILD", "import os, signal\ninput()\nos.kill(os.getpid(), signal.SIGSEGV)")
    monkeypatch.setattr("torch._inductor.cpu_vec_isa.pick_vec_isa", lambda: "avx2")
    with inductor.PackageProcess(torch.device("cpu")) as run:
        run.package = tmp_path / "a.pt2"
        with pytest.raises(RuntimeError, match="package was not written: the process that ran it was ended by SIGSEGV"):
            run(torch.zeros(1, 3, 8, 8))
