"""`graphed` when something changes: graphs made anew, what runs eagerly and why, and errors."""

from __future__ import annotations

import copy
import gc
import logging
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import timm_gac
from graphed_loops import (
    CUDA,
    DEVICE,
    assert_same,
    batch,
    both,
    count,
    loss_of,
    network,
    stand_in,  # noqa: F401  (a fixture of all tests here)
)
from timm_gac.runtime import graphed as graphed_module
from timm_gac.runtime.capture import captured
from timm_gac.runtime.fingerprint import Fingerprint
from timm_gac.runtime.graph_pair import CudaGraphs
from timm_gac.runtime.graphed import Graphs, graphed, ungraphed

cuda_only = pytest.mark.skipif(not CUDA, reason="it is about CUDA itself")


@pytest.mark.parametrize("change", ["assign", "load", "move", "replace"])
def test_other_weights_are_used(change: str) -> None:
    plain, model = network(), graphed(network())
    other = network(name="test_gac_msresnet")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
    for step in range(8):
        for one in (plain, model):
            if step == 4 and change in ("assign", "load"):
                one.load_state_dict(copy.deepcopy(other.state_dict()), assign=change == "assign")
            elif step == 4 and change == "move":
                one.to("cpu").to(DEVICE)
            elif step == 4:
                one.reset_classifier(7)
                nn.init.constant_(one.fc.weight, 0.01)
                nn.init.zeros_(one.fc.bias)
            images, _ = batch(step)
            one(images).square().sum().backward()
        assert_same(model, plain)
    assert count(model) == 1  # graphs of memory that is no longer the network's are gone


def test_attributes_and_modes_count() -> None:
    def loop(model: nn.Module) -> list[float]:
        losses = []
        for step in range(12):
            if step == 3:
                model.layer1.eval()
            elif step == 6:
                model.bn1.momentum = 0.3
            elif step == 9:
                model.set_spike_packing(True)
            loss = loss_of(model, step)
            loss.backward()
            losses.append(loss.detach())
        return torch.stack(losses).tolist()

    both(loop, captures=4)


def test_how_float32_is_multiplied_counts() -> None:
    """By either of PyTorch's switches; the newer one makes ``torch.get_float32_matmul_precision`` an error."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.fp32_precision

    def loop(model: nn.Module) -> list[float]:
        matmul.fp32_precision, cudnn.allow_tf32 = before, True
        losses = []
        for step in range(9):
            if step == 3:
                cudnn.allow_tf32 = False
            elif step == 6:
                matmul.fp32_precision = "tf32"
            loss = loss_of(model, step)
            loss.backward()
            losses.append(loss.detach())
        return torch.stack(losses).tolist()

    try:
        both(loop, captures=3)
    finally:
        matmul.fp32_precision, cudnn.allow_tf32 = before, True


def test_what_runs_eagerly_says_why(caplog: pytest.LogCaptureFixture) -> None:
    model = graphed(network())

    def reasons(call: Callable[[], Any], number: int = 3) -> list[str]:
        caplog.clear()
        before = count(model)
        with caplog.at_level(logging.INFO):
            for _ in range(number):
                call()
        assert count(model) == before
        return [record.message for record in caplog.records if "eagerly" in record.message]

    seen: list[str] = []
    handle = model.layer1[0].conv1.register_forward_hook(lambda *_: seen.append("called"))
    (line,) = reasons(lambda: loss_of(model, 0).backward())
    assert "layer1.0.conv1 has hooks" in line and len(seen) == 3
    handle.remove()
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    (line,) = reasons(lambda: loss_of(model, 0).backward())
    assert "hooks on all modules" in line
    handle.remove()
    model.set_grad_checkpointing(True)
    (line,) = reasons(lambda: loss_of(model, 0).backward())
    assert "checkpointing" in line
    model.set_grad_checkpointing(False)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
        (line,) = reasons(lambda: loss_of(model, 0).backward())
    assert "saved tensors" in line
    (line,) = reasons(lambda: model(x=batch(0)[0]))
    assert "x by name" in line
    with torch.autograd.set_detect_anomaly(True):
        (line,) = reasons(lambda: loss_of(model, 0).backward())
    assert "anomaly" in line
    assert reasons(lambda: ungraphed_like_eval(model)) == []
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    (line,) = reasons(lambda: loss_of(model, 0))
    assert "can be differentiated" in line


def ungraphed_like_eval(model: nn.Module) -> None:
    """Evaluation, with and without gradients, which are eager without a line."""
    model.eval()
    loss_of(model, 0).backward()
    model.train()
    with torch.no_grad():
        loss_of(model, 0)


def test_hooks_on_the_network_itself_and_on_parameters_run() -> None:
    model = graphed(network())
    seen: list[str] = []
    model.register_forward_pre_hook(lambda *_: seen.append("before"))
    model.register_forward_hook(lambda *_: seen.append("after"))
    model.fc.weight.register_hook(lambda gradient: seen.append("gradient"))
    model.fc.weight.register_post_accumulate_grad_hook(lambda parameter: seen.append("accumulated"))
    for step in range(4):
        loss_of(model, step).backward()
    assert count(model) == 1 and seen == 4 * ["before", "after", "gradient", "accumulated"]


def test_a_tensor_that_learns_beside_the_parameters_is_not_lost(caplog: pytest.LogCaptureFixture) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 2, device=DEVICE)
            self.scale = [torch.ones(2, device=DEVICE, requires_grad=True)]

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x) * self.scale[0]

    model = graphed(Scaled())
    with caplog.at_level(logging.INFO):
        for _ in range(4):
            model(torch.ones(1, 3, device=DEVICE)).sum().backward()
    assert count(model) == 0 and "not among its parameters" in caplog.text
    assert torch.equal(model.scale[0].grad, 4 * model.fc(torch.ones(3, device=DEVICE)))  # type: ignore[arg-type]


def test_a_buffer_that_is_written_on_another_device_counts(caplog: pytest.LogCaptureFixture) -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 2, device=DEVICE)
            self.register_buffer("calls", torch.zeros((), device="cpu" if CUDA else "meta"))

        def forward(self, x: Tensor) -> Tensor:
            self.calls.add_(1)
            return self.fc(x)

    model = graphed(Counts())
    with caplog.at_level(logging.INFO):
        for _ in range(4):
            model(torch.ones(1, 3, device=DEVICE)).sum().backward()
    assert count(model) == 0 and "it writes its buffer calls on" in caplog.text
    assert not CUDA or model.calls == 4


def test_the_fingerprint_sees_every_change() -> None:
    model = network()
    before = Fingerprint(model)
    block = model.layer1[0]
    changes: dict[str, Callable[[], Any]] = {
        "mode": lambda: block.bn1.eval(),
        "number": lambda: setattr(block.bn1.norm, "eps", 0.5),
        "new attribute": lambda: setattr(model.layer2, "other", None),
        "learns": lambda: block.conv1.weight.requires_grad_(False),
        "memory": lambda: setattr(block.conv1.weight, "data", block.conv1.weight.detach().clone()),
        "parameter": lambda: setattr(model.fc, "bias", nn.Parameter(torch.zeros(10, device=DEVICE))),
        "buffer": lambda: setattr(block.bn1.norm, "running_mean", torch.zeros(1, device=DEVICE)),
        "child": lambda: setattr(model, "fc", nn.Identity()),
        "hook": lambda: block.conv2.register_forward_hook(lambda *_: None),
    }
    for name, change in changes.items():
        assert before.holds(), name
        change()
        assert not before.holds(), name
        after = Fingerprint(model)
        assert after != before and (after.reason is None) == (name != "hook"), name
        before = after
    assert not before.holds()  # it has a reason
    first, second = Fingerprint(network()), Fingerprint(network())
    assert first.holds() and first != second
    model = network()
    first = Fingerprint(model)
    model.layer1[0].bn1.norm.eps = float(str(model.layer1[0].bn1.norm.eps))  # another object of the same value
    assert not first.holds() and Fingerprint(model) == first and hash(Fingerprint(model)) == hash(first)


def test_tuples_and_outputs_without_gradients() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 2, device=DEVICE)

        def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            out = self.fc(x) * y
            return out, (out > 0).float()

    model, plain = graphed(Pair()), Pair()
    plain.load_state_dict(model.state_dict())
    for step in range(4):
        x, y = torch.full((1, 3), float(step), device=DEVICE), torch.full((1, 2), 2.0, device=DEVICE)
        got, expected = model(x, y), plain(x, y)
        assert type(got) is tuple and not got[1].requires_grad
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
        for out in (got, expected):
            out[0].square().sum().backward()
    assert count(model) == 1
    assert_same(model, plain)


def test_copies_pickles_and_undoing() -> None:
    model = graphed(network())
    names = list(model.state_dict())
    for step in range(3):
        loss_of(model, step).backward()
    copied, unpickled = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    assert count(model) == 1 and count(copied) == 0 and vars(copied)["forward"].__self__ is copied
    assert type(unpickled) is type(model) and list(unpickled.state_dict()) == names
    for one in (copied, unpickled, graphed(unpickled)):
        with torch.no_grad():
            one.fc.weight.zero_()
            one.fc.bias.fill_(3)
        for step in range(3):
            assert torch.equal(one(batch(step)[0]), torch.full((4, 10), 3.0, device=DEVICE))
        assert (model(batch(0)[0]) != 3).any()
    assert ungraphed(model) is model and "forward" not in vars(model) and "_graphed" not in vars(model)
    assert graphed(graphed(model)) is model and ungraphed(ungraphed(model)) is model


def test_the_number_of_graphs_is_bounded(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphed_module, "_UNUSED_AFTER", 7)
    model = graphed(network(), max_graphs=2)
    with caplog.at_level(logging.INFO):
        for size in (2, 3, 4):
            for step in range(3):
                loss_of(model, step, size).backward()
    assert count(model) == 2 and sum("max_graphs" in record.message for record in caplog.records) == 1
    for step in range(4):
        loss_of(model, step, 4).backward()
    assert count(model) == 2  # the one that was not used for long has made room
    caplog.clear()
    for size in range(2, 80):
        graphs = vars(model)["_graphed"]
        graphs._find(model, type(model).forward, (torch.zeros(size, device=DEVICE),), (size,))
    assert len(graphs._seen) == graphed_module._REMEMBERED


def test_a_failed_capture_leaves_the_network_eager(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, model = network(), graphed(network())
    monkeypatch.setattr(Graphs.backend, "capture", lambda self, compute: (_ for _ in ()).throw(RuntimeError("no")))
    with caplog.at_level(logging.INFO):
        for step in range(4):
            for one in (plain, model):
                loss_of(one, step).backward()
    assert count(model) == 0 and caplog.text.count("capturing failed with RuntimeError: no") == 1
    assert_same(model, plain)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match=r"expected a torch\.nn\.Module, got function: give the network"):
        graphed(lambda x: x)  # type: ignore[type-var]
    with pytest.raises(ValueError, match="expected warmup as an integer >= 1, got 0"):
        graphed(network(), warmup=0)
    with pytest.raises(ValueError, match="expected max_graphs as an integer >= 1, got True"):
        graphed(network(), max_graphs=True)
    model = network()
    model.forward = lambda x: x
    with pytest.raises(ValueError, match="another one in its place: call graphed first"):
        graphed(model)
    with pytest.raises(ValueError, match="inside DataParallel: call graphed before"):
        wrapped = nn.DataParallel.__new__(nn.DataParallel)
        graphed(wrapped)


def test_without_cuda_it_stays_as_it_is(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphed_module.torch.cuda, "is_available", lambda: False)
    model = network()
    with caplog.at_level(logging.INFO):
        assert graphed(model) is model
    assert "forward" not in vars(model) and "there is none" in caplog.text


def test_functional_call_and_transforms_pass_by() -> None:
    model = graphed(network())
    images, _ = batch(0)
    for _ in range(3):
        model(images).sum().backward()
    parameters = {name: torch.zeros_like(value) for name, value in model.named_parameters()}
    assert torch.equal(torch.func.functional_call(model, parameters, (images,)), torch.zeros(4, 10, device=DEVICE))
    assert timm_gac.graphed is graphed and timm_gac.ungraphed is ungraphed and Graphs.backend.device_type == DEVICE


@cuda_only
def test_a_failing_step_leaves_cuda_as_it_was(caplog: pytest.LogCaptureFixture) -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 3, device="cuda")

        def forward(self, x: Tensor) -> Tensor:
            return F.dropout(self.fc(x), 0.5) * float(x.sum().item())

    stream = torch.cuda.current_stream()
    model = graphed(Reads())
    for _ in range(4):
        model(torch.ones(2, 3, device="cuda")).sum().backward()
    assert count(model) == 0 and "capturing failed" in caplog.text and torch.cuda.current_stream() == stream
    assert issubclass(Graphs.backend, CudaGraphs) and F.dropout(torch.ones(100, device="cuda")).sum() > 0


@cuda_only
def test_a_failed_capture_leaves_random_numbers_and_memory_in_order() -> None:
    stream, device = torch.cuda.Stream(), torch.device("cuda")
    sampled = torch.zeros(64, device=device)
    graph, _ = captured(sampled.uniform_, device, stream)
    for fail in (lambda: sampled.sum().item(), lambda: 1 / 0):
        for pool in (None, torch.cuda.graph_pool_handle()):
            torch.manual_seed(3)
            graph.replay()
            expected = [sampled.clone(), torch.rand(64, device=device)]
            graph.replay()
            expected.append(sampled.clone())
            torch.manual_seed(3)
            graph.replay()
            got = [sampled.clone()]
            with pytest.raises((RuntimeError, ZeroDivisionError)):
                captured(
                    lambda fail=fail: (torch.empty(1 << 22, device=device).uniform_(), fail()), device, stream, pool
                )
            got.append(torch.rand(64, device=device))
            graph.replay()
            got.append(sampled.clone())
            assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
            again, value = captured(lambda: F.dropout(torch.ones(64, device=device)), device, stream)
            again.replay()
            assert value.sum() > 0
            del again, value
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    blocks = []
    for _ in range(3):  # freed on another stream: given back only while no capture is underway
        block = torch.empty(1 << 24, dtype=torch.uint8, device=device)
        block.record_stream(stream)
        blocks.append(block)
    del block, blocks
    torch.cuda.synchronize()
    torch.empty(1 << 20, device=device)
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= before
