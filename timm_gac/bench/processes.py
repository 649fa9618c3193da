"""Several processes on one host: how a benchmark starts them, and how they share a training step."""

from __future__ import annotations

import copy
import datetime
import gc
import logging
import math
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..runtime.collectives import average_gradients, share_tensors
from ..runtime.graphs import GraphedStep
from ..train.sync import synchronise_norms
from .ops import relative_error
from .steps import precision_settings

PROVIDERS = ("ddp", "all_reduce", "all_reduce+graph")
# In float64: norm(got - expected) / norm(expected) of the worst parameter.
GRADIENT_TOLERANCE = 1e-9
TIMEOUT = datetime.timedelta(minutes=5)


class Group:
    """This process within the group: NCCL (GPUs) or gloo (CPUs) for training steps, gloo for values on the host.

    Args:
        store: Store through which the processes find each other.
        rank: Number of this process, from 0.
        size: Number of processes.
        on_cuda: Whether each process has a GPU of its own.
    """

    def __init__(self, store: dist.Store, rank: int, size: int, on_cuda: bool) -> None:
        self.rank, self.size, self.main = rank, size, rank == 0
        self.device = torch.device("cuda", rank) if on_cuda else torch.device("cpu")
        if on_cuda:
            torch.cuda.set_device(self.device)
        else:
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // size))
        dist.init_process_group("nccl" if on_cuda else "gloo", store=store, rank=rank, world_size=size, timeout=TIMEOUT)
        self._host: Any = dist.new_group(backend="gloo", timeout=TIMEOUT)
        self.collectives = "nccl " + ".".join(map(str, torch.cuda.nccl.version())) if on_cuda else "gloo"

    def largest(self, value: float) -> float:
        """The largest value of all processes. Waits for all of them; uses no GPU."""
        values = torch.tensor([value], dtype=torch.float64)
        dist.all_reduce(values, dist.ReduceOp.MAX, group=self._host)
        return float(values.item())

    def join(self, network: nn.Module, provider: str, sync_bn: bool) -> tuple[nn.Module, Callable[[], None] | None]:
        """Prepare a network that all processes train together.

        Args:
            network: On this process's device, with the same weights on all.
            provider: ``ddp``, or ``all_reduce`` for one all-reduce after the backward pass.
            sync_bn: Use batch norm over all processes.

        Returns:
            The network to call, and the function to call after each backward pass (None for ``ddp``).
        """
        share_tensors(network.state_dict().values())
        joined, after_backward = network, None
        if provider == "ddp":
            joined = nn.parallel.DistributedDataParallel(
                network, device_ids=[self.device.index] if self.device.type == "cuda" else None
            )
        else:
            parameters = list(network.parameters())

            def after_backward() -> None:
                average_gradients(parameters)

        if sync_bn:  # not before: DDP refuses PyTorch's layer on a CPU, where ours works
            synchronise_norms(network)
        return joined, after_backward

    def same_weights(self, network: nn.Module) -> bool:
        """Whether every process has the first one's weights, bit for bit."""
        weights = torch.cat([parameter.detach().reshape(-1) for parameter in network.parameters()])
        first = weights.clone()
        dist.broadcast(first, 0)
        return self.largest(float(not torch.equal(weights, first))) == 0.0


def launch(work: Callable[[Group, Any], None], config: object, size: int, on_cuda: bool) -> None:
    """Run ``work(group, config)`` in several processes and wait for them; if one fails, all are ended.

    Args:
        work: A function at the top level of a module.
        config: Anything that can be pickled.
        size: Number of processes.
        on_cuda: Whether each gets a GPU.

    Raises:
        torch.multiprocessing.ProcessRaisedException: A process failed; the message has its traceback.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    torch.multiprocessing.spawn(_start, (work, config, size, on_cuda, store.port), nprocs=size)


def _start(rank: int, work: Callable[[Group, Any], None], config: object, size: int, on_cuda: bool, port: int) -> None:
    logging.basicConfig(level=logging.INFO if rank == 0 else logging.WARNING, format="%(message)s")
    group = Group(dist.TCPStore("127.0.0.1", port, is_master=False), rank, size, on_cuda)
    work(group, config)
    gc.collect()  # gloo's threads end when the last object that holds the group, such as DDP, is gone
    dist.destroy_process_group()


def gradient_error(
    group: Group, network: nn.Module, images: Tensor, labels: Tensor, provider: str, sync_bn: bool
) -> float:
    """Compare the gradients of a step of all processes with those of a single process, in float64.

    With batch norm over all processes, the single process takes all images at once; else it averages over the parts of
    the processes. In float64 no rounding error flips a spike, so whole networks can be compared.

    Args:
        group: The processes.
        network: The network; a copy is used.
        images: Images of all processes ``(size * B, C, H, W)``, the same on each.
        labels: Their labels ``(size * B,)``.
        provider: One of `PROVIDERS`.
        sync_bn: Batch norm over all processes.

    Returns:
        Relative error of the worst parameter on any process.
    """
    images = images.double()
    parts = list(zip(images.chunk(group.size), labels.chunk(group.size), strict=True))
    with precision_settings("float32", search=False):
        alone = _double(network)
        for batch in [(images, labels)] if sync_bn else parts:
            _backward(alone, *batch)
        expected = [p.grad / (1 if sync_bn else group.size) for p in alone.parameters() if p.grad is not None]
        shared = _double(network)
        joined, after_backward = group.join(shared, provider.split("+")[0], sync_bn)

        def step(images: Tensor, labels: Tensor) -> Tensor:
            shared.zero_grad(set_to_none=True)
            loss = _backward(joined, images, labels)
            if after_backward is not None:
                after_backward()
            return loss

        graph = GraphedStep(step, warmup=2) if "graph" in provider else None
        for _ in range(4 if graph else 1):
            (graph or step)(*parts[group.rank])
        got = [p.grad for p in shared.parameters() if p.grad is not None]
        error = max(relative_error(g, e) for g, e in zip(got, expected, strict=True))
        if graph is not None:
            graph.release()
    return group.largest(float("inf") if math.isnan(error) else error)


def _double(network: nn.Module) -> nn.Module:
    return copy.deepcopy(network).double().train()


def _backward(network: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    loss = nn.functional.cross_entropy(network(images), labels)
    loss.backward()
    return loss.detach()
