"""Before the first training step its kernels are compiled side by side, which leaves no trace in the run."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from shared_step import train_step
from timm_gac.train import Recipe
from timm_gac.train import step as step_module
from timm_gac.train.setup import create_accelerator, create_network


def prepared(tmp_path, **changes):
    """A step, its network, images and targets."""
    recipe = Recipe(
        **dict(
            model="test_gac_msresnet",
            num_steps=2,
            lr=0.01,
            warmup_epochs=0,
            epochs=1,
            drop_rate=0.2,
            drop_path_rate=0.2,
        )
        | changes
    )
    accelerator = create_accelerator(recipe, tmp_path, (), not torch.cuda.is_available())
    torch.manual_seed(0)
    network = create_network(recipe, 4, 3).to(accelerator.device).train()
    step = train_step(accelerator, recipe, network)
    images = torch.randn(8, 3, 16, 16).to(accelerator.device)
    targets = F.one_hot(torch.arange(8) % 4, 4).float().to(accelerator.device)
    return step, network, images, targets


def test_no_trace_is_left(tmp_path, monkeypatch):
    monkeypatch.delenv("TIMM_GAC_COMPILE_AHEAD", raising=False)
    step, network, images, targets = prepared(tmp_path)
    seen = []

    def twice(function, device):
        for _ in range(2):
            function()
            seen.append((network.conv1.weight.grad, network.bn1.running_mean.clone()))

    monkeypatch.setattr(step_module, "compile_ahead", twice)
    state, numbers = copy.deepcopy(network.state_dict()), torch.get_rng_state()
    step._compile_ahead(images, targets)
    assert len(seen) == 2 and not torch.equal(seen[0][1], seen[1][1])  # passes that moved the statistics
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())
    assert torch.equal(torch.get_rng_state(), numbers)


@pytest.mark.parametrize("why", ["hook", "switched off"])
def test_left_out(why, tmp_path, monkeypatch):
    monkeypatch.delenv("TIMM_GAC_COMPILE_AHEAD", raising=False)
    step, network, images, targets = prepared(tmp_path)
    monkeypatch.setattr(step_module, "compile_ahead", lambda *_: pytest.fail("the network was called"))
    if why == "hook":
        network.layer1[0].bn1.register_forward_hook(lambda *_: None)
    else:
        monkeypatch.setenv("TIMM_GAC_COMPILE_AHEAD", "0")
    step._compile_ahead(images, targets)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("cuda_graph", [False, True])
def test_a_run_is_the_same_with_it(cuda_graph, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    weights, ahead = [], []
    run = step_module.compile_ahead
    monkeypatch.setattr(step_module, "compile_ahead", lambda *given: ahead.append(run(*given)))
    for switch in ("train", "0"):
        monkeypatch.setenv("TIMM_GAC_COMPILE_AHEAD", switch)
        step, network, images, targets = prepared(tmp_path, cuda_graph=cuda_graph)
        torch.manual_seed(1)
        for number in range(7):
            step(images.contiguous(memory_format=torch.channels_last), targets, number)
        step.release()
        weights.append(torch.cat([value.flatten().double() for value in network.state_dict().values()]))
    assert len(ahead) == 1
    assert torch.equal(*weights)
