"""A training step under torch.compile."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import timm
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import timm_gac  # noqa: F401  registers the models
from gac_kernels.common.fake import make_known
from timm_gac.bench.loops.ours import Settings, short_epochs


def _network() -> torch.nn.Module:
    """Two blocks: compilers take long, and a third would be as the second."""
    return timm.create_model("test_gac_msresnet", layers=(1, 1, 0)).to(memory_format=torch.channels_last)


def _train(step: Callable[..., torch.Tensor], images: torch.Tensor) -> torch.Tensor:
    with torch.autocast(images.device.type, torch.bfloat16):
        loss = step(images).float().square().mean()
    loss.backward()
    return loss.detach()


def test_a_training_step_is_one_graph_and_is_compiled_for_each_mode_and_batch_size_alone() -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    network = _network()
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


@pytest.mark.timeout(600)  # on a GPU Inductor compiles three graphs
@pytest.mark.parametrize("spike_packing", [False, True])
def test_three_epochs_compile_training_once_and_its_smaller_last_batch_once(
    device: torch.device, spike_packing: bool
) -> None:
    torch._dynamo.reset()
    network = _network().to(device)
    network.set_spike_packing(spike_packing)
    images = torch.randn(8, *network.pretrained_cfg["input_size"], device=device)
    labels = torch.randint(network.num_classes, (8,), device=device)
    compiled = torch.compile(network, backend="inductor" if device.type == "cuda" else "eager")
    row = short_epochs(compiled, images, labels, Settings(device, "bfloat16", 8), 3)
    torch._dynamo.reset()
    # Training, evaluation, and training with the smaller batch.
    assert (row["graphs"], row["graph_breaks"]) == (3, 0)
    assert (row["recompiles"], row["late_recompiles"]) == (1, 0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="compiles for a GPU")
@pytest.mark.timeout(600)
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_a_compiled_step_trains_as_an_eager_one_on_a_gpu(device: torch.device, mode: str) -> None:
    torch._dynamo.reset()
    eager = timm.create_model("test_gac_msresnet", num_classes=10).to(device, memory_format=torch.channels_last)
    network = copy.deepcopy(eager)
    images = torch.randn(8, *eager.pretrained_cfg["input_size"], device=device)
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.randint(10, (8,), device=device)
    losses = []
    for step in (eager, torch.compile(network, mode=mode, fullgraph=True)):
        optimizer = torch.optim.SGD(step.parameters(), lr=0.1, momentum=0.9)
        found = []
        for _ in range(16):
            with torch.autocast("cuda", torch.bfloat16):
                loss = torch.nn.functional.cross_entropy(step(images).float(), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        losses.append(found)
    torch._dynamo.reset()
    expected, got = (torch.tensor(found) for found in losses)
    # Rounding flips spikes from the first step on, so the curves only stay near each other; both learn the batch, in
    # eager mode on a CPU down to 0.49 to 0.65 of the first loss (three seeds).
    torch.testing.assert_close(got[0], expected[0], rtol=0.1, atol=0.1)
    assert expected[-1] < 0.8 * expected[0] and got[-1] < 0.8 * got[0]


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
