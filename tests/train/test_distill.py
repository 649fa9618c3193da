"""Distillation: the loss by hand, a teacher that changes nothing else, what is refused, and what is recorded."""

from __future__ import annotations

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from accelerate.state import AcceleratorState

from timm_gac.hub import load_model, prepare_folder, save_model_folder, save_quantized
from timm_gac.hub.card import write_card
from timm_gac.hub.facts import gather
from timm_gac.hub.prepare import PublishConfig
from timm_gac.train import Recipe
from timm_gac.train.distill import Teacher, distillation_loss
from timm_gac.train.loop import Trainer, train
from toy_runs import options, same, weights

CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(scope="module")
def plain(npz: Path) -> Recipe:
    return Recipe(
        model="test_gac_msresnet",
        num_steps=2,
        data=str(npz),
        dataset="toy",
        epochs=3,
        batch_size=16,
        lr=0.05,
        warmup_epochs=1,
        cutmix=1.0,
        mix_probability=0.5,
        ema_decay=0.9,
        report="ema",
        loss="tet",
        drop_rate=0.1,
        crop_padding=1,
        eval_every=3,
        stored_dtype="float32",
    )


@pytest.fixture(scope="module")
def teacher(plain: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of an ANN of the same shape."""
    out = tmp_path_factory.mktemp("teacher") / "ann_seed0"
    train(
        replace(plain, model="test_ann_resnet", num_steps=1, epochs=12, mix_probability=0.0, eval_every=12),
        options(out),
    )
    AcceleratorState._reset_state(reset_partial_state=True)
    assert json.loads((out / "eval.json").read_text())["top1"] >= 0.75  # chance is 0.25
    return out


@pytest.fixture
def recipe(plain: Recipe, teacher: Path) -> Recipe:
    return replace(plain, teacher=str(teacher))


@pytest.mark.parametrize("steps", [None, 3])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_loss_and_gradient_by_hand(steps: int | None, temperature: float) -> None:
    """``T^2 sum p log(p/q)`` over classes, whose gradient at the logits is ``T (q - p)``; both a mean over rows."""
    generator = torch.Generator().manual_seed(0)
    shape = (5, 7) if steps is None else (5, steps, 7)
    logits = (3 * torch.randn(shape, generator=generator, dtype=torch.float64)).requires_grad_()
    taught = 3 * torch.randn(5, 7, generator=generator, dtype=torch.float64)
    loss = distillation_loss(logits, taught, temperature)
    loss.backward()
    student, target = logits.detach().numpy().reshape(5, -1, 7), taught.numpy()[:, None]
    q, p = (np.exp(z / temperature) / np.exp(z / temperature).sum(-1, keepdims=True) for z in (student, target))
    rows = 5 * (steps or 1)
    assert loss.item() == pytest.approx(temperature**2 * (p * np.log(p / q)).sum() / rows, rel=1e-10)
    expected = temperature * (q - p) / rows
    np.testing.assert_allclose(logits.grad.numpy().reshape(expected.shape), expected, rtol=1e-9, atol=1e-12)
    assert distillation_loss(taught, taught, temperature).item() == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("loss", ["tet", "mean"])
def test_a_step_has_the_gradient_of_the_formula(recipe: Recipe, tmp_path: Path, loss: str) -> None:
    """Of the loss of the labels and the divergence, weighed; the teacher gets no gradient and stays as it is."""
    changes = dict(loss=loss, distill_weight=0.7, distill_temperature=2.0, drop_rate=0.0, lr=0.01)
    state = Trainer(replace(recipe, **changes), options(tmp_path)).state
    state.set_training()
    state.teacher.train()  # of no effect
    images, targets = next(iter(state.loaders.train.batches(0)))
    images = images.contiguous(memory_format=torch.channels_last)
    before = {name: tensor.clone() for name, tensor in state.teacher.network.state_dict().items()}
    got, _ = state.train_step._loss(images, targets)
    got.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in state.network.named_parameters()}
    state.network.zero_grad()
    steps = state.network.forward_steps(images)
    rows = steps if loss == "tet" else steps.mean(1, keepdim=True)
    taught = (load_model(Path(recipe.teacher) / "model")(images) / 2.0).softmax(-1).detach()[:, None]
    log_q = (rows / 2.0).log_softmax(-1)
    divergence = (taught * (taught.log() - log_q)).sum(-1).mean()
    labels = -(targets[:, None] * rows.log_softmax(-1)).sum(-1).mean()
    if loss == "tet":
        labels = 0.95 * labels + 0.05 * (steps - 1.0).square().mean()
    expected = 0.3 * labels + 0.7 * 4.0 * divergence
    expected.backward()
    assert got.item() == pytest.approx(expected.item(), rel=1e-5)
    for name, parameter in state.network.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-3, atol=1e-6, msg=name)
    after = state.teacher.network.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(parameter.grad is None for parameter in state.teacher.parameters()) and not state.teacher.training
    assert not any(module.training for module in state.teacher.modules())


def test_it_draws_the_student_to_the_teacher(recipe: Recipe, npz: Path, tmp_path: Path) -> None:
    data = np.load(npz)
    images = torch.from_numpy(data["x_test"]).float() / 255.0
    changes = dict(epochs=6, eval_every=6, drop_rate=0.0, cutmix=0.0, mix_probability=0.0, label_smoothing=0.3)
    divergences = {}
    for name, more in (("alone", dict(teacher=None)), ("taught", dict(distill_weight=1.0))):
        train(replace(recipe, **changes | more), options(tmp_path / name))
        student = load_model(tmp_path / name / "model")
        mean, std = (torch.tensor(student.pretrained_cfg[key])[:, None, None] for key in ("mean", "std"))
        with torch.no_grad():
            normal = (images - mean) / std
            theirs = load_model(Path(recipe.teacher) / "model")(normal)
            divergences[name] = distillation_loss(student(normal), theirs, 1.0).item()
    assert divergences["taught"] < 0.8 * divergences["alone"]


def test_a_teacher_of_no_weight_changes_nothing_to_the_bit(recipe: Recipe, plain: Recipe, tmp_path: Path) -> None:
    """So it changes neither initial weights nor random numbers."""
    train(plain, options(tmp_path / "alone"))
    train(replace(recipe, distill_weight=0.0), options(tmp_path / "taught", recipe_name="toy"))
    assert same(weights(tmp_path / "alone"), weights(tmp_path / "taught"))
    assert not any("distilled_from" in (tmp_path / "taught" / f"{n}.json").read_text() for n in ("config", "eval"))
    (row,) = csv.DictReader((tmp_path / "taught" / "result.csv").open())
    assert row["recipe"] == "toy"  # nothing was distilled, whatever it answered
    card = write_card(gather(tmp_path / "taught" / "model", tmp_path / "taught"), "org/taught")
    assert "istill" not in card and "| teacher |" not in card and "| loss | tet |" in card


@pytest.mark.parametrize(("temperature", "off"), [(0.01, 1e-5), (1.0, 1e-6), (100.0, 1e-4)])
def test_the_temperatures_allowed_keep_the_loss_in_float32(temperature: float, off: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logits, taught = 3 * torch.randn(2, 128, 100, generator=generator)
    logits.requires_grad_()
    loss = distillation_loss(logits, taught, temperature)
    (gradient,) = torch.autograd.grad(loss, logits)
    wide = logits.detach().double().requires_grad_()
    expected = distillation_loss(wide, taught.double(), temperature)
    (wide_gradient,) = torch.autograd.grad(expected, wide)
    assert loss.item() == pytest.approx(expected.item(), rel=off)
    assert (gradient - wide_gradient).norm() < 1e-4 * wide_gradient.norm()


@pytest.mark.parametrize("stop_at", [5, 8])
def test_stopped_and_resumed_is_bit_for_bit_the_same(
    recipe: Recipe, tmp_path: Path, stop_at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(recipe, options(tmp_path / "whole"))
    trainer = Trainer(recipe, options(tmp_path / "parts", checkpoint_steps=100))
    monkeypatch.setattr(trainer, "_must_stop", lambda: trainer.state.step == stop_at)
    assert trainer.run() == 0 and trainer.state.step == stop_at
    torch.manual_seed(99)
    assert train(recipe, options(tmp_path / "parts", resume=True)) == 0
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "parts"))


def test_another_teacher_is_refused_on_resuming(recipe: Recipe, plain: Recipe, teacher: Path, tmp_path: Path) -> None:
    trainer = Trainer(recipe, options(tmp_path / "run"))
    trainer.stop_signal = 15
    assert trainer.run() == 128 + 15
    for changed, message in (
        (plain, "teacher: '.*ann_seed0' became None"),
        (replace(recipe, distill_weight=0.9), r"distill_weight: 0\.5 became 0\.9"),
        (replace(recipe, distill_temperature=1.0), r"distill_temperature: 4\.0 became 1\.0"),
    ):
        with pytest.raises(ValueError, match=message):
            train(changed, options(tmp_path / "run", resume=True))
    kept = (teacher / "model" / "model.safetensors").read_bytes()
    shutil.copytree(teacher, tmp_path / "moved")
    network = load_model(teacher / "model")
    with torch.no_grad():
        network.fc.bias[0] += 1.0
    save_model_folder(network, teacher / "model")
    try:
        with pytest.raises(ValueError, match="teacher that this run began with, got ann_seed0 with other weights"):
            train(recipe, options(tmp_path / "run", resume=True))
    finally:
        (teacher / "model" / "model.safetensors").write_bytes(kept)
    with pytest.raises(ValueError, match="expected a model folder, ORG/NAME on the Hub"):
        train(replace(recipe, teacher=str(tmp_path / "none")), options(tmp_path / "run", resume=True))
    moved = replace(recipe, teacher=str(tmp_path / "moved" / "model"))  # of the same weights, by another name
    assert train(moved, options(tmp_path / "run", resume=True)) == 0
    assert json.loads((tmp_path / "run" / "eval.json").read_text())["distilled_from"]["name"] == "moved"


def stored(folder: Path, name: str = "test_ann_resnet", labels: list[str] | None = None, **args: object) -> str:
    torch.manual_seed(1)
    save_model_folder(timm.create_model(name, **{"num_classes": 4} | args), folder)
    if labels:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"label_names": labels}))
    return str(folder)


def test_what_cannot_teach_is_refused(plain: Recipe, npz: Path, tmp_path: Path) -> None:
    named = tmp_path / "named.npz"
    np.savez(named, **dict(np.load(npz)), label_names=np.array(["ant", "bee", "cat", "dog"]))
    refused = [
        (stored(tmp_path / "a", num_classes=5), "expected a teacher for the 4 classes .*, got '.*' for 5"),
        (stored(tmp_path / "b", in_chans=1), "expected a teacher for the 3 input channels .*, got '.*' for 1"),
        (stored(tmp_path / "c", labels=["bee", "ant", "cat", "dog"]), "the training data in their order"),
        (
            stored(tmp_path / "d", labels=["ant", "bee", "cat", "emu"]),
            "expected classes among ant, bee, cat, emu in the training data, .*, got dog",
        ),
        ("test_gac_msresnet", "expected a network with trained weights, got 'test_gac_msresnet'"),
        (str(tmp_path / "none"), "expected a model folder, ORG/NAME on the Hub"),
    ]
    for number, (name, message) in enumerate(refused):
        with pytest.raises(ValueError, match=message):
            train(replace(plain, data=str(named), teacher=name), options(tmp_path / f"run{number}"))
    for changes, message in (
        (dict(distill_weight=1.5), "distill_weight from 0 to 1, got 1.5"),
        (dict(distill_weight=float("nan")), "distill_weight from 0 to 1"),
        (dict(distill_temperature=0.0), "distill_temperature from 0.01 to 100, got 0.0"),
        (dict(distill_temperature=-1.0), "distill_temperature from 0.01 to 100, got -1.0"),
        (dict(distill_temperature=1e5), "distill_temperature from 0.01 to 100, got 100000.0"),
        (dict(distill_temperature=float("inf")), "distill_temperature from 0.01 to 100, got inf"),
        (dict(distill_temperature=float("nan")), "distill_temperature from 0.01 to 100, got nan"),
        (dict(teacher=""), "expected teacher as the name of a network, got ''"),
        (dict(init=""), "expected init as the name of a network, got ''"),
        (dict(init="local-dir:"), "expected init as the name of a network, got 'local-dir:'"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(plain, **changes)


def test_any_network_of_the_package_can_teach(plain: Recipe, tmp_path: Path) -> None:
    """Of another T, with 8-bit weights, and one spiking network an ANN."""
    spiking = stored(tmp_path / "spiking", "gac_msresnet18_cifar", layers=(1, 1, 1), channels=(8, 8, 8), num_steps=3)
    rounded = str(save_quantized(load_model(Path(spiking)), tmp_path / "rounded"))
    for number, changes in enumerate(
        (
            dict(teacher=spiking),
            dict(teacher=rounded, precision="bfloat16", grad_accumulation=2, channels_last=False),
            dict(
                teacher=f"local-dir:{spiking}", model="test_ann_resnet", num_steps=1, loss="mean", label_smoothing=0.1
            ),
        )
    ):
        out = tmp_path / f"run{number}"
        assert train(replace(plain, epochs=1, eval_every=1, **changes), options(out)) == 0
        lesson = json.loads((out / "eval.json").read_text())["distilled_from"]
        assert lesson["architecture"] == "gac_msresnet18_cifar" and lesson["num_steps"] == 3


def test_a_teacher_sees_images_as_it_was_trained_on_them() -> None:
    network = timm.create_model("test_ann_resnet", num_classes=4).eval()
    theirs = dict(mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 1.0))
    given = dict(mean=(0.4, 0.4, 0.5), std=(0.2, 0.3, 0.4))
    pixels = torch.rand(2, 3, 8, 8)
    seen, wanted = (
        (pixels - torch.tensor(cfg["mean"])[:, None, None]) / torch.tensor(cfg["std"])[:, None, None]
        for cfg in (given, theirs)
    )
    with torch.no_grad():
        torch.testing.assert_close(Teacher(network, theirs, given, {})(seen), network(wanted), rtol=1e-4, atol=1e-5)
        assert torch.equal(Teacher(network, theirs, theirs, {})(wanted), network(wanted))


def test_a_reader_learns_that_it_was_distilled(recipe: Recipe, plain: Recipe, tmp_path: Path) -> None:
    for name, given in (("taught", recipe), ("alone", plain)):
        given = replace(
            given, model="test_ann_resnet", num_steps=1
        )  # its logits vary with the image after so few steps
        train(given, options(tmp_path / name, recipe_name="toy", results=tmp_path / "results.csv"))
    config, evaluation = (json.loads((tmp_path / "taught" / f"{n}.json").read_text()) for n in ("config", "eval"))
    lesson = config["distilled_from"]
    assert lesson == evaluation["distilled_from"] and len(lesson.pop("content")) == 16
    assert lesson == dict(name="ann_seed0", architecture="test_ann_resnet", weight=0.5, temperature=4.0)
    assert "distilled_from" not in json.loads((tmp_path / "alone" / "config.json").read_text())
    rows = list(csv.DictReader((tmp_path / "results.csv").open()))
    assert [row["recipe"] for row in rows] == ["toy, distilled from ann_seed0", "toy"]
    cards = []
    for name in ("taught", "alone"):
        prepare_folder(tmp_path / name, tmp_path / f"{name}_out", PublishConfig(repo_id=f"org/{name}"))
        cards.append((tmp_path / f"{name}_out" / "README.md").read_text())
        published = (tmp_path / f"{name}_out" / "training.json").read_text()
        assert str(tmp_path.parent) not in published + cards[-1]
    assert (
        "It was distilled (Hinton et al., arXiv:1503.02531) from `ann_seed0` (`test_ann_resnet`, an ANN): 0.5"
        in cards[0]
    )
    assert "| teacher | ann_seed0 |" in cards[0] and "| distill_temperature | 4 |" in cards[0]
    assert "distill" not in cards[1]


@CUDA
@pytest.mark.parametrize("changes", [dict(cuda_graph=True), dict(precision="float16")], ids=["graph", "float16"])
def test_on_a_gpu_it_is_distilled_too(
    recipe: Recipe, tmp_path: Path, changes: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the weights of an eager run: in a graph up to rounding, in float16 by its loss."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    eager = replace(recipe, drop_rate=0.0, distill_weight=0.9)
    train(eager, options(tmp_path / "eager", cpu=False))
    train(replace(eager, **changes), options(tmp_path / "other", cpu=False))
    expected, got = weights(tmp_path / "eager"), weights(tmp_path / "other")
    if "cuda_graph" in changes:
        for name, tensor in got.items():
            if not name.startswith("rng"):
                torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=1e-5)
    losses = [
        float([*csv.DictReader((tmp_path / name / "metrics.csv").open())][-1]["train_loss"])
        for name in ("eager", "other")
    ]
    assert losses[1] == pytest.approx(losses[0], rel=0.1)
