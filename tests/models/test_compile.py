"""A training step under torch.compile."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import timm
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import timm_gac  # noqa: F401  registers the models
from gac_kernels.common.fake import make_known


def _train(step: Callable[..., torch.Tensor], images: torch.Tensor) -> torch.Tensor:
    with torch.autocast(images.device.type, torch.bfloat16):
        loss = step(images).float().square().mean()
    loss.backward()
    return loss.detach()


def test_a_training_step_is_one_graph_and_is_compiled_for_each_mode_and_batch_size_alone() -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    network = timm.create_model("test_gac_msresnet").to(memory_format=torch.channels_last)
    step = torch.compile(network, backend=counter, fullgraph=True)
    shape = network.pretrained_cfg["input_size"]
    frames = []
    for _ in range(3):
        network.train()
        for batch in (4, 4, 3):
            _train(step, torch.randn(batch, *shape))
        network.eval()
        with torch.no_grad():
            step(torch.randn(4, *shape))
        frames.append(counter.frame_count)
    torch._dynamo.reset()
    # Training, once for the first batch and once for smaller ones, and evaluation.
    assert frames == [3, 3, 3]


def test_inductor_is_told_to_call_operators_as_they_are() -> None:
    lowering = pytest.importorskip("torch._inductor.lowering")
    make_known("gac_kernels::norm_lif")
    assert torch.ops.gac_kernels.norm_lif.default in lowering.lowerings
    assert lowering.maybe_layout_constraints(torch.ops.gac_kernels.norm_lif.default) is not None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="compiles for a GPU")
@pytest.mark.timeout(120)  # where Inductor writes its arguments into a log it does not end
def test_a_training_step_compiles_on_a_gpu(device: torch.device) -> None:
    torch._dynamo.reset()
    network = timm.create_model("test_gac_msresnet").to(device, memory_format=torch.channels_last)
    images = torch.randn(8, *network.pretrained_cfg["input_size"], device=device)
    images = images.contiguous(memory_format=torch.channels_last)
    expected = _train(network, images)
    found = _train(torch.compile(network, fullgraph=True), images)
    torch.testing.assert_close(found, expected, rtol=0.1, atol=0.1)
