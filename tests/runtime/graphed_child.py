"""One of the processes of `test_two_processes_with_ddp`: trains in DDP, eagerly and graphed, and compares."""

from __future__ import annotations

import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

import timm_gac
from graph_stand_in import StandIn
from ranks import joined
from timm_gac.runtime.graphed import Graphs


def train(graphed: bool, device: torch.device) -> tuple[dict[str, torch.Tensor], torch.Tensor, int]:
    """Weights and losses after steps of which every other one updates the weights."""
    torch.manual_seed(0)
    network = timm.create_model("test_gac_msresnet", num_classes=10).to(device).train()
    if graphed:
        timm_gac.graphed(network)
    model = DistributedDataParallel(network, device_ids=[device] if device.type == "cuda" else None)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    generator = torch.Generator().manual_seed(dist.get_rank())
    losses = []
    for step in range(50 if device.type == "cuda" else 6):
        images = torch.randn(4, 3, 16, 16, generator=generator).to(device)
        labels = torch.randint(10, (4,), generator=generator).to(device)
        model.require_backward_grad_sync = step % 2 == 1  # as in no_sync()
        with torch.autocast(device.type, torch.bfloat16):
            loss = F.cross_entropy(model(images).float(), labels)
        loss.backward()
        losses.append(loss.detach())
        if step % 2 == 1:
            optimizer.step()
            optimizer.zero_grad()
    captured = vars(network)["_graphed"].count if graphed else 0
    return network.state_dict(), torch.stack(losses), captured


def main(device: torch.device) -> None:
    """Compare both, on gloo and CPUs or on NCCL and a GPU each."""
    if device.type == "cpu":
        Graphs.backend = StandIn
        torch.cuda.is_available = lambda: True
    expected, expected_losses, _ = train(False, device)
    state, losses, captured = train(True, device)
    assert captured == 1, captured
    assert torch.equal(losses, expected_losses), (losses, expected_losses)
    different = [name for name, value in state.items() if not torch.equal(value, expected[name])]
    assert different == [], different
    sums = [torch.zeros_like(losses) for _ in range(2)]
    dist.all_gather(sums, losses)
    assert not torch.equal(*sums)  # each process had images of its own


if __name__ == "__main__":
    with joined() as device:
        main(device)
