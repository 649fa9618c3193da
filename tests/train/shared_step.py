"""What two processes check together, in one start for several tests; the first one writes the figures to a file."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path

import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import timm_gac  # noqa: F401 (registers the models)
from timm_gac.bench import processes as bench_processes
from timm_gac.bench import scaling as bench_scaling
from timm_gac.train import Recipe
from timm_gac.train import step as step_module
from timm_gac.train.optim import create_optimizer
from timm_gac.train.setup import create_accelerator, create_network, prepare
from timm_gac.train.sync import synchronise_norms

STEPS = 7  # the graph is captured in the fifth


def together(group, folder: str) -> None:
    """Everything, on this process; the first one writes ``figures.json``."""
    torch.backends.cudnn.deterministic, torch.backends.cudnn.allow_tf32 = True, False
    figures = {
        "exchange": exchange(group, Path(folder)),
        "sharded": sharded(group),
        "gradients": gradients(group),
    }
    scaling(group, Path(folder) / "scaling.csv")
    if group.main:
        (Path(folder) / "figures.json").write_text(json.dumps(figures))


def exchange(group, folder: Path) -> dict:
    """Trained weights under DDP, and with the exchange of `TrainStep`, in a CUDA graph where there are GPUs."""
    on_cpu = group.device.type == "cpu"
    os.environ |= {"RANK": str(group.rank), "LOCAL_RANK": str(group.rank), "WORLD_SIZE": str(group.size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}  # asked for; the group exists already
    recipe = Recipe(
        model="test_gac_msresnet", num_steps=2, lr=0.01, warmup_epochs=0, clip_grad=1.0, sync_bn=True, epochs=1
    )
    accelerator = create_accelerator(recipe, folder, (), on_cpu)
    assert accelerator.num_processes == group.size == 2
    if on_cpu:
        step_module.GraphedStep = Eager  # everything about the graph but the graph
    torch.manual_seed(0)
    start = create_network(recipe, 4, 3).state_dict()
    torch.manual_seed(group.rank)
    trained, ddp = [], []
    for graphed in (False, True):
        recipe = Recipe(**recipe.to_dict() | {"cuda_graph": graphed})
        network = create_network(recipe, 4, 3)  # another one on each process, which are to begin with the first's
        if group.main:
            network.load_state_dict(start)
        network.to(group.device)
        step = train_step(accelerator, recipe, network)
        ddp.append(isinstance(step.model, torch.nn.parallel.DistributedDataParallel))
        generator = torch.Generator().manual_seed(group.rank)
        for number in range(STEPS):
            images = torch.randn(8, 3, 16, 16, generator=generator).to(group.device)
            targets = F.one_hot(torch.randint(4, (8,), generator=generator), 4).float().to(group.device)
            step(images.contiguous(memory_format=torch.channels_last), targets, number)
        captured = getattr(step._run, "captured", False)
        step.release()
        trained.append(flat(network.state_dict()))
    moved = trained[0] - flat(start)
    return {
        "ddp": ddp,
        "captured": captured,
        "same_weights": group.same_weights(network),
        "difference": group.largest((trained[1] - trained[0]).norm().item() / moved.norm().item()),
    }


def train_step(accelerator, recipe: Recipe, network: torch.nn.Module) -> step_module.TrainStep:
    """The trainer's step on a network."""
    raw = create_optimizer(network, recipe, accelerator.device)
    model, optimizer = prepare(accelerator, recipe, network, raw)
    synchronise_norms(network)
    return step_module.TrainStep(
        accelerator=accelerator,
        model=model,
        optimizer=optimizer,
        average=None,
        recipe=recipe,
        steps_per_epoch=STEPS,
        threshold=1.0,
    )


def flat(state: dict) -> torch.Tensor:
    return torch.cat([tensor.flatten().double().cpu() for tensor in state.values()])


class Eager(step_module.GraphedStep):
    """Stands in for the graph where there is no GPU: every call runs the step."""

    def __call__(self, *tensors):
        return self._step(*tensors)


def sharded(group) -> dict:
    """Losses and weights of a network that FSDP2 divides, beside those of a whole one, on the same images."""
    torch.manual_seed(0)
    whole = timm.create_model("test_gac_msresnet", num_classes=4, num_steps=2).to(group.device).train()
    mesh = init_device_mesh(group.device.type, (group.size,))
    divided = fully_shard(copy.deepcopy(whole), mesh=mesh)
    share = sum(p.to_local().numel() for p in divided.parameters()) / sum(p.numel() for p in whole.parameters())
    images, labels = torch.randn(8, 3, 16, 16).to(group.device), torch.randint(4, (8,)).to(group.device)
    losses: dict[str, list[float]] = {"whole": [], "divided": []}
    for name, network in (("whole", whole), ("divided", divided)):
        optimizer = torch.optim.SGD(network.parameters(), lr=0.05)
        for _ in range(3):
            loss = F.cross_entropy(network(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[name].append(loss.item())
    state = get_model_state_dict(divided, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    expected = whole.state_dict()
    largest = 0.0
    if group.main:  # the whole weights are the first process's alone
        assert state.keys() == expected.keys()
        largest = max((state[name] - tensor.cpu()).abs().max().item() for name, tensor in expected.items())
    return {"share": group.largest(share), "largest_difference": group.largest(largest), **losses}


def gradients(group) -> dict:
    """Errors of shared gradients in float64, and that error where processes do not exchange what they should."""
    torch.manual_seed(0)
    network = timm.create_model("test_gac_msresnet", num_classes=4, num_steps=2).to(group.device)
    images, labels = torch.randn(8, 3, 16, 16).to(group.device), torch.randint(4, (8,)).to(group.device)

    def error(provider: str, sync_bn: bool) -> float:
        return bench_processes.gradient_error(
            group=group,
            network=network,
            images=images,
            labels=labels,
            provider=provider,
            sync_bn=sync_bn,
        )

    providers = [p for p in bench_processes.PROVIDERS if "graph" not in p or group.device.type == "cuda"]
    right = {f"{provider} {sync_bn}": error(provider, sync_bn) for provider in providers for sync_bn in (True, False)}
    average, synchronise = bench_processes.average_gradients, bench_processes.synchronise_norms
    bench_processes.average_gradients = lambda parameters: None
    without_exchange = error("all_reduce", True)
    bench_processes.average_gradients, bench_processes.synchronise_norms = average, lambda network: None
    without_sync = error("ddp", True)
    bench_processes.synchronise_norms = synchronise
    return {"right": right, "without_exchange": without_exchange, "without_sync": without_sync}


def scaling(group, csv: Path) -> None:
    """One row of the benchmark."""
    config = bench_scaling.ScalingConfig(
        model="test_gac_msresnet",
        processes=2,
        providers=("all_reduce",),
        batch_norms=("sync",),
        batch=4,
        steps=3,
        image_size=16,
        num_steps=2,
        precision="float32",
        device=group.device.type,
        csv=csv,
        commit="abc",
    )
    bench_scaling.measure_scaling(group, config)
    dist.barrier()
