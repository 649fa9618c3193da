"""`graphed`: the same training as without, in the loops that people write."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from timm.utils import ModelEmaV3, freeze, unfreeze
from torch import Tensor, nn

from graphed_loops import (
    CUDA,
    DEVICE,
    STEPS,
    assert_same,
    batch,
    both,
    count,
    loss_of,
    network,
    sgd,
    simple_loop,
    stand_in,  # noqa: F401  (a fixture of all tests here)
)
from ranks import run_ranks
from timm_gac.runtime.graphed import graphed
from warm import WarmPython

two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


@pytest.mark.parametrize("dtype", [torch.bfloat16, None], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("set_to_none", [True, False])
def test_training_is_the_same(dtype: torch.dtype | None, set_to_none: bool) -> None:
    both(simple_loop(dtype, set_to_none), captures=1)


def test_packed_spikes() -> None:
    def loop(model: nn.Module) -> list[float]:
        model.set_spike_packing(True)
        return simple_loop()(model)

    both(loop, captures=1)


def test_accumulation_clipping_and_average() -> None:
    def loop(model: nn.Module) -> list[float]:
        optimizer, average = sgd(model), ModelEmaV3(model, decay=0.9)
        losses = []
        for step in range(STEPS):
            loss = loss_of(model, step)
            (loss / 2).backward()
            losses.append(loss.detach())
            if step % 2:
                losses.append(nn.utils.clip_grad_norm_(model.parameters(), 0.5))
                optimizer.step()
                optimizer.zero_grad()
                average.update(model)
        model.eval()
        losses.append(loss_of(average.module, 999).detach())
        model.train()
        return torch.stack(losses).tolist()

    both(loop, captures=1)


def test_smaller_last_batch_and_evaluation_between() -> None:
    def loop(model: nn.Module) -> list[float]:
        optimizer = sgd(model)
        losses = []
        for step in range(max(STEPS, 9)):
            loss = loss_of(model, step, size=3 if step % 3 == 2 else 4)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
            if step % 3 == 2:
                model.eval()
                with torch.no_grad():
                    losses.append(loss_of(model, 1000 + step))
                model.train()
        return torch.stack(losses).tolist()

    both(loop, captures=2)


def test_freezing_counts_from_the_next_call() -> None:
    def loop(model: nn.Module) -> list[float]:
        losses = []
        for epoch in range(3):
            (freeze if epoch == 1 else unfreeze)(model, ["conv1", "bn1", "layer1"])
            optimizer = sgd(model)
            for step in range(4):
                loss = loss_of(model, 10 * epoch + step)
                loss.backward()
                optimizer.step()
                losses.append(loss.detach())
                if step < 3:
                    optimizer.zero_grad()
        return torch.stack(losses).tolist()

    both(loop)


def test_dropout_and_drop_path_draw_the_same_numbers() -> None:
    both(simple_loop(), captures=1, drop_rate=0.3, drop_path_rate=0.2)


def test_a_scaler_of_float16() -> None:
    if not CUDA:
        pytest.skip("float16 needs a GPU")

    def loop(model: nn.Module) -> list[float]:
        optimizer, scaler = sgd(model), torch.amp.GradScaler("cuda")
        losses = []
        for step in range(STEPS):
            loss = loss_of(model, step, dtype=torch.float16)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            losses += [loss.detach(), nn.utils.clip_grad_norm_(model.parameters(), 1.0)]
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        return torch.stack(losses).tolist()

    both(loop, captures=1)


def test_any_network_can_be_graphed() -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        layers = [
            nn.Conv2d(3, 8, 3, 2),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Flatten(),
            nn.Dropout(0.2),
            nn.Linear(392, 10),
        ]
        return nn.Sequential(*layers).to(DEVICE)

    both(simple_loop(), captures=1, build=build)


def test_gradient_of_the_input_and_kept_outputs() -> None:
    plain, model = network(), graphed(network())
    kept: list[tuple[Tensor, Tensor]] = []
    for step in range(4):
        inputs = [batch(step)[0].requires_grad_() for _ in range(2)]
        outputs = [one(x) for one, x in zip((plain, model), inputs, strict=True)]
        for out in outputs:
            out.square().sum().backward()
        assert torch.equal(inputs[0].grad, inputs[1].grad)  # type: ignore[arg-type]
        kept.append((outputs[0], outputs[1]))
    assert count(model) == 1 and all(torch.equal(a, b) for a, b in kept)
    assert_same(model, plain)


def test_two_forward_passes_before_a_backward_pass() -> None:
    def loop(model: nn.Module) -> list[float]:
        losses = []
        for step in range(6):
            loss = loss_of(model, step) + loss_of(model, 100 + step) * loss_of(model, 200 + step)
            loss.backward()
            losses.append(loss.detach())
        return torch.stack(losses).tolist()

    both(loop, captures=1)


def test_an_output_that_nobody_wants_does_not_stop_the_next(caplog: pytest.LogCaptureFixture) -> None:
    model = graphed(network())
    with caplog.at_level(logging.INFO):
        for step in range(4):
            loss_of(model, step)
        loss = loss_of(model, 5)
        loss_of(model, 6).backward()
    assert [record.message for record in caplog.records if "still waits" in record.message] != []
    loss.backward()


def test_a_second_backward_pass_is_an_error() -> None:
    model = graphed(network())
    for step in range(3):
        loss = loss_of(model, step)
        loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"one backward pass for each forward pass.*ungraphed"):
        loss.backward()


def test_double_backward_is_an_error_and_parameters_are_checked() -> None:
    model = graphed(network())
    for step in range(3):
        loss_of(model, step).backward()
    with pytest.raises(RuntimeError, match=r"create_graph=True.*ungraphed"):
        torch.autograd.grad(loss_of(model, 4), list(model.parameters()), create_graph=True, allow_unused=True)
    loss = loss_of(model, 5)
    with torch.no_grad():
        model.fc.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_statistics_move_once_a_step() -> None:
    plain, model = network(), graphed(network(), warmup=3)
    for step in range(3):
        for one in (plain, model):
            loss_of(one, step).backward()
        assert_same(model, plain)
        assert int(model.layer1[0].bn1.num_batches_tracked) == step + 1


def test_accelerate_wraps_and_unwraps_it(request: pytest.FixtureRequest) -> None:
    accelerate = pytest.importorskip("accelerate")
    # Accelerate keeps one state a process, which tests before this one may have left.
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    request.addfinalizer(lambda: accelerate.state.AcceleratorState._reset_state(reset_partial_state=True))
    accelerator = accelerate.Accelerator(mixed_precision="bf16", cpu=not CUDA)

    def loop(model: nn.Module) -> list[float]:
        prepared, optimizer = accelerator.prepare(model, sgd(model))
        losses = []
        for step in range(4):
            images, labels = batch(step)
            loss = F.cross_entropy(prepared(images), labels)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
        return torch.stack(losses).tolist()

    _, model = both(loop, captures=1)
    assert graphed(model) is model  # accelerate's forward around ours is known
    unwrapped = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    assert unwrapped(batch(0)[0]).shape == (4, 10)


@pytest.mark.parametrize("where", ["cpu", pytest.param("gpus", marks=two_gpus)])
def test_two_processes_with_ddp(where: str, warm_python: WarmPython) -> None:
    run_ranks(warm_python, Path(__file__).with_name("graphed_child.py"), where)
