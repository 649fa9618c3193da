"""One of the processes of `test_two_processes_with_ddp`: a step in 8 bits in DDP, with batch norms of its own."""

from __future__ import annotations

import copy
import logging

import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from gac_kernels import use_backend
from quick_interpreter import quicken
from ranks import joined
from timm_gac.bench.check import prepare_weights
from timm_gac.bench.definition import layers_run
from timm_gac.train.sync import synchronise_norms

NARROW = {"layers": (1, 0, 0), "channels": (24, 24, 24), "strides": (2, 1, 1)}


def forward(model: nn.Module, device: torch.device) -> tuple[int, torch.Tensor]:
    """How many layers ran in kernels of one byte, and the loss of this process's images."""
    generator = torch.Generator().manual_seed(dist.get_rank())
    images = torch.randn(2, 3, 8, 8, generator=generator).to(device, memory_format=torch.channels_last)
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        logits = model(images)
    return layers_run(logits), F.cross_entropy(logits.float(), torch.arange(2, device=device))


def gradients(model: nn.Module, device: torch.device) -> tuple[int, dict[str, torch.Tensor]]:
    """How many layers ran in kernels of one byte, and all gradients."""
    ran, loss = forward(model, device)
    loss.backward()
    return ran, {name.removeprefix("module."): p.grad for name, p in model.named_parameters()}


def main(device: torch.device) -> None:
    """DDP's gradients are the mean of both processes' own, from the kernels; SyncBatchNorm does without them."""
    on_gpus = device.type == "cuda"
    torch.manual_seed(0)
    network = timm.create_model("test_gac_msresnet", num_classes=10, num_steps=2, int8_convs=True, **NARROW)
    with use_backend("eager"):
        prepare_weights(network, torch.randn(4, 3, 8, 8))  # so that neurons fire
    network = network.to(device, memory_format=torch.channels_last)

    ran, expected = gradients(copy.deepcopy(network), device)
    assert ran == 2, ran
    for grad in expected.values():
        dist.all_reduce(grad)
        grad /= dist.get_world_size()
    ids = [device] if on_gpus else None
    ran, found = gradients(DistributedDataParallel(network, device_ids=ids), device)
    assert ran == 2, ran
    assert found.keys() == expected.keys() and found["layer1.0.conv2.weight"].abs().sum() > 0
    for name, grad in found.items():
        error = (grad - expected[name]).norm() / expected[name].norm().clamp(min=1e-12)
        assert error < (1e-2 if on_gpus else 1e-5), (name, error)

    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("timm_gac.layers.eight_bit").addHandler(handler)
    synchronise_norms(network)
    ran, _ = forward(network, device)
    assert ran == 0 and ["share their statistics" in line for line in said] == [True], (ran, said)


if __name__ == "__main__":
    quicken()
    with joined() as device, use_backend("triton"):
        main(device)
