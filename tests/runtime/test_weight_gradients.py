"""Weight gradients beside the batch norms: the same bits as without, whatever is asked of the backward pass."""

from __future__ import annotations

import contextlib

import pytest
import timm
import torch
from torch import Tensor, nn

import timm_gac  # noqa: F401 (registers the models)
from timm_gac.layers.convolution import Conv2d
from timm_gac.runtime import weight_gradients
from timm_gac.runtime.graphs import GraphedStep
from timm_gac.runtime.weight_gradients import overlap_weight_gradients

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def deterministic():
    """cuDNN that gives the same bits for the same step."""
    before = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    yield
    torch.backends.cudnn.deterministic = before


def network() -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model("test_gac_msresnet", num_classes=10).to(DEVICE, memory_format=torch.channels_last)
    return model.train()


def images(seed: int = 0) -> Tensor:
    made = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(seed)).to(DEVICE)
    return made.contiguous(memory_format=torch.channels_last)


def loss_of(model: nn.Module, x: Tensor, beside: bool, dtype: torch.dtype | None = torch.bfloat16) -> Tensor:
    wanted = overlap_weight_gradients() if beside else contextlib.nullcontext()
    with wanted, torch.autocast(DEVICE, dtype or torch.bfloat16, enabled=dtype is not None):
        return model(x).float().square().sum()


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_same(got: nn.Module, expected: nn.Module) -> None:
    for name, gradient in gradients(expected).items():
        other = gradients(got)[name]
        assert (gradient is None) == (other is None), name
        if gradient is not None and other is not None:
            assert other.dtype == gradient.dtype and torch.equal(other, gradient), name


def overlapped_convolutions(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """Collects the convolutions that run with a cast weight."""
    found: list[nn.Module] = []
    original = Conv2d._overlapped

    def note(self, *args):
        found.append(self)
        return original(self, *args)

    monkeypatch.setattr(Conv2d, "_overlapped", note)
    return found


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
def test_gradients_are_those_without_to_the_bit(packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, beside = network(), network()
    for model in (plain, beside):
        model.set_spike_packing(packed)
    loss_of(plain, images(), False).backward()
    found = overlapped_convolutions(monkeypatch)
    loss_of(beside, images(), True).backward()
    assert set(found) == {module for module in beside.modules() if isinstance(module, nn.Conv2d)}
    assert_same(beside, plain)
    assert all("cast_weight" not in vars(module) for module in found)


def test_several_passes_add_up() -> None:
    plain, beside = network(), network()
    for model, wanted in ((plain, False), (beside, True)):
        (loss_of(model, images(0), wanted) + loss_of(model, images(1), wanted)).backward()
        again = loss_of(model, images(2), wanted)
        again.backward(retain_graph=True)
        again.backward()
    assert_same(beside, plain)


def test_a_module_used_twice_in_a_pass_gets_the_sum() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.conv = Conv2d(4, 4, 3, padding=1, bias=False, device=DEVICE)

        def forward(self, x: Tensor) -> Tensor:
            wanted = weight_gradients.overlap_enabled(self)
            with weight_gradients.with_cast_weights(self, Conv2d, x) if wanted else contextlib.nullcontext():
                return self.conv(self.conv(x))

    plain, beside, x = Twice(), Twice(), torch.randn(2, 4, 8, 8, device=DEVICE)
    loss_of(plain, x, False).backward()
    loss_of(beside, x, True).backward()
    expected = plain.conv.weight.grad
    torch.testing.assert_close(beside.conv.weight.grad, expected, rtol=1e-2, atol=1e-2 * expected.abs().max().item())


def test_the_input_alone_can_be_asked_for() -> None:
    plain, beside, found = network(), network(), []
    for model, wanted in ((plain, False), (beside, True)):
        x = images().requires_grad_()
        found.append(torch.autograd.grad(loss_of(model, x, wanted), x)[0])
        assert all(gradient is None for gradient in gradients(model).values())
        loss = loss_of(model, x, wanted)
        found.append(torch.autograd.grad(loss, x, retain_graph=True)[0])
        loss.backward()
    assert torch.equal(found[0], found[2]) and torch.equal(found[1], found[3])
    assert_same(beside, plain)


@pytest.mark.parametrize("why", ["float32", "no_grad", "checkpointing", "frozen"])
def test_nothing_changes_where_there_is_nothing_to_gain(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, found = network(), overlapped_convolutions(monkeypatch)
    if why == "checkpointing":
        model.set_grad_checkpointing()
    if why == "frozen":
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                module.weight.requires_grad_(False)
    with torch.no_grad() if why == "no_grad" else contextlib.nullcontext():
        loss = loss_of(model, images(), True, None if why == "float32" else torch.bfloat16)
    assert not found
    if why != "no_grad":
        loss.backward()
        assert all((g is not None) == p.requires_grad for p, g in ((p, p.grad) for p in model.parameters()))


def test_weights_go_back_when_a_pass_fails() -> None:
    model = network()
    model.layer2.forward = None
    with pytest.raises(TypeError):
        loss_of(model, images(), True)
    assert all("cast_weight" not in vars(module) for module in model.modules())


def test_compiled_networks_do_without(monkeypatch: pytest.MonkeyPatch) -> None:
    model, found = network().eval(), overlapped_convolutions(monkeypatch)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.equal(loss_of(compiled, images(), True), loss_of(model, images(), False)) and not found


def test_graphed_steps_ask_for_it() -> None:
    seen = []
    GraphedStep(lambda x: seen.append(weight_gradients._OVERLAP.get()))._run_step([torch.zeros(1)])
    assert seen == [True] and not weight_gradients._OVERLAP.get()
