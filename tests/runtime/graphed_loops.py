"""Networks, batches and loops of the tests of `graphed`, and the comparison with training without it.

On a GPU with CUDA graphs; elsewhere a stand-in repeats the recorded call where a graph would be replayed, so that what
decides, keeps and restores is tested without one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graph_stand_in import StandIn
from timm_gac.runtime import graphed as graphed_module
from timm_gac.runtime.graphed import Graphs, graphed

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
STEPS = 50 if CUDA else 4
Loop = Callable[[nn.Module], list[float]]


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The stand-in where there is no GPU, and cuDNN that gives the same bits for the same step."""
    before = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    if not CUDA:
        monkeypatch.setattr(Graphs, "backend", StandIn)
        monkeypatch.setattr(graphed_module.torch.cuda, "is_available", lambda: True)
    yield
    torch.backends.cudnn.deterministic = before


def network(name: str = "test_gac_msresnet", **arguments: Any) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10, **arguments).to(DEVICE, memory_format=torch.channels_last)
    return model.train()


def batch(step: int, size: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(size, 3, 16, 16, generator=generator).to(DEVICE)
    labels = torch.randint(10, (size,), generator=generator).to(DEVICE)
    return images.contiguous(memory_format=torch.channels_last), labels


def autocast(dtype: torch.dtype | None = torch.bfloat16) -> Any:
    return torch.autocast(DEVICE, dtype or torch.bfloat16, enabled=dtype is not None)


def loss_of(model: nn.Module, step: int, size: int = 4, dtype: torch.dtype | None = torch.bfloat16) -> Tensor:
    images, labels = batch(step, size)
    with autocast(dtype):
        return F.cross_entropy(model(images).float(), labels)


def count(model: nn.Module) -> int:
    return vars(model)["_graphed"].count


def assert_same(got: nn.Module, expected: nn.Module) -> None:
    """State and gradients are the same bits."""
    state = expected.state_dict()
    assert list(got.state_dict()) == list(state)
    assert [name for name, value in got.state_dict().items() if not torch.equal(value, state[name])] == []
    others = dict(got.named_parameters())
    for name, parameter in expected.named_parameters():
        gradient = others[name].grad
        assert (gradient is None) == (parameter.grad is None), name
        assert gradient is None or torch.equal(gradient, parameter.grad), name


def both(
    loop: Loop, captures: int | None = None, build: Callable[..., nn.Module] = network, **arguments: Any
) -> tuple[nn.Module, nn.Module]:
    """Run a loop eagerly and graphed; losses, state and gradients are the same bits."""
    plain, model = build(**arguments), graphed(build(**arguments))
    torch.manual_seed(1)
    expected = loop(plain)
    torch.manual_seed(1)
    losses = loop(model)
    assert losses == expected and len(set(losses)) > 1
    assert_same(model, plain)
    if captures is not None:
        assert count(model) == captures
    return plain, model


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)


def simple_loop(dtype: torch.dtype | None = torch.bfloat16, set_to_none: bool = True) -> Loop:
    def loop(model: nn.Module) -> list[float]:
        optimizer = sgd(model)
        losses = []
        for step in range(STEPS):
            loss = loss_of(model, step, dtype=dtype)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=set_to_none)
            losses.append(loss)
        return torch.stack(losses).tolist()

    return loop
