"""When a network's kernels are compiled before its first call; on a GPU, that the answer is the same, and quick."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys

import pytest
import timm
import torch

from timm_gac.runtime import first_call


class OnGpu(torch.Tensor):
    """A tensor that says that it is on a GPU."""

    is_cuda = True


@pytest.fixture
def ahead(monkeypatch):
    """How often kernels would have been compiled ahead, which calls the function twice."""
    calls = []
    monkeypatch.delenv(first_call.SWITCH, raising=False)

    def compile_ahead(function, device):
        calls.append(device)
        function()
        return function()

    monkeypatch.setattr(first_call, "compile_ahead", compile_ahead)
    return calls


def images(*size, dtype=torch.float32):
    return torch.zeros(size or (2, 3, 16, 16), dtype=dtype).as_subclass(OnGpu)


def called(network, x):
    """How often the function behind the first call runs."""
    before = []
    first_call.compiled_first(network, lambda given: before.append(given) or given, x)
    return len(before)


@pytest.fixture
def network():
    return timm.create_model("test_gac_msresnet").eval()


def test_once_for_each_kind_of_input(ahead, network):
    assert [called(network, images()) for _ in range(3)] == [2, 1, 1]
    assert called(network, images(1, 3, 16, 16)) == 2
    assert called(network, images().contiguous(memory_format=torch.channels_last)) == 2
    with torch.no_grad():
        assert called(network, images()) == 2
    assert called(network.bfloat16(), images(dtype=torch.bfloat16)) == 2
    assert called(copy.deepcopy(network), images(dtype=torch.bfloat16)) == 2
    assert len(ahead) == 6


def test_sizes_that_vary_do_not_count_for_ever(ahead, network):
    calls = [called(network, images(size, 3, 16, 16)) for size in range(1, 81)]
    assert calls == [2] * 64 + [1] * 16


@pytest.mark.parametrize(
    "state", ["training", "hook", "pre-hook", "global hook", "counter", "switched off", "replica", "cpu"]
)
def test_left_out(state, ahead, network, monkeypatch):
    x, handle = images(), None
    if state == "training":
        network.train()
    elif state == "hook":
        handle = network.layer1[0].bn1.register_forward_hook(lambda *_: None)
    elif state == "pre-hook":
        handle = network.encoder.register_forward_pre_hook(lambda *_: None)
    elif state == "global hook":
        handle = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
    elif state == "counter":
        monkeypatch.setattr(torch._C, "_len_torch_dispatch_stack", lambda: 1)
    elif state == "switched off":
        monkeypatch.setenv(first_call.SWITCH, "0")
    elif state == "replica":
        network._is_replica = True
    else:
        x = torch.zeros(2, 3, 16, 16)
    try:
        assert called(network, x) == 1 and not ahead
    finally:
        if handle is not None:
            handle.remove()
    if "hook" in state:  # a later call without them is a first call
        assert called(network, x) == 2


CHILD = """
import json, sys, time
import timm, torch, triton
import timm_gac
from timm_gac.runtime import first_call

torch.manual_seed(0)
compiled = []
triton.knobs.compilation.listener = lambda *, src, cache_hit, **_: compiled.append(cache_hit)
network = timm.create_model("gac_msresnet18_cifar", device="cuda").eval()
with torch.no_grad():
    network.train()(torch.randn(64, 3, 32, 32, device="cuda"))
    network.eval()
network = timm_gac.quantize(network) if sys.argv[1] == "8 bits" else timm_gac.fuse_for_inference(network)
network = network.to(dtype=torch.bfloat16, memory_format=torch.channels_last)
x = torch.randn(128, 3, 32, 32, device="cuda", dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
del compiled[:]
torch.cuda.synchronize()
start = time.perf_counter()
with torch.no_grad():
    logits = network(x)
torch.cuda.synchronize()
result = {"seconds": time.perf_counter() - start, "compiled": len(compiled), "from disk": sum(compiled)}
with torch.no_grad():
    again = network(x)
result |= {"logits": logits.float().tolist(), "same": torch.equal(logits, again), "later": len(compiled)}
sys.stdout.write(json.dumps(result))
"""


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", ["folded", "8 bits"])
def test_first_answer_on_a_gpu(kind, tmp_path):
    """The same bits as without; where there are 16 cores within 10 s, and with Triton's cache within 2 s."""
    rows = []
    for switch in ("1", "1", "0"):
        environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path), "TIMM_GAC_COMPILE_AHEAD": switch}
        environment.pop("TRITON_INTERPRET", None)
        done = subprocess.run([sys.executable, "-c", CHILD, kind], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        rows.append(json.loads(done.stdout))
    cold, warm, plain = rows
    assert cold["same"] and cold["logits"] == warm["logits"] == plain["logits"]
    assert cold["compiled"] > 5 and cold["from disk"] < cold["compiled"]
    assert warm["compiled"] == warm["from disk"] == plain["from disk"] == plain["compiled"]
    if len(os.sched_getaffinity(0)) >= 16:
        assert cold["seconds"] < 10.0 and warm["seconds"] < 2.0
