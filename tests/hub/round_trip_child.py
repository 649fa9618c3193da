"""What a stranger does with a published model, in a fresh process with an empty cache: run by test_round_trip.py."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

import timm_gac
from timm_gac import cli


def fine_tune_with_accelerate(model: torch.nn.Module, images: Tensor, labels: Tensor) -> None:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    model, optimizer = accelerator.prepare(model, optimizer)
    model.train()
    losses = []
    for _ in range(2):
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()
        losses.append(loss.item())
    assert losses[1] < losses[0], losses
    sys.stdout.write("accelerate\n")


def compare_with_transformers(repo_id: str, images: Tensor, expected: Tensor, scratch: Path, labels: Tensor) -> None:
    import numpy as np
    from PIL import Image
    from transformers import AutoImageProcessor, AutoModelForImageClassification, Trainer, TrainingArguments

    model = AutoModelForImageClassification.from_pretrained(repo_id).eval()
    with torch.no_grad():
        assert torch.equal(model(pixel_values=images).logits, expected)
    assert model.config.num_labels == 10 and model.config.id2label[3] == "three"

    picture = Image.fromarray(np.full((8, 8), 255, dtype=np.uint8))
    pixels = AutoImageProcessor.from_pretrained(repo_id)(picture, return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 1, 8, 8) and torch.allclose(pixels, torch.ones(1))  # (1 - mean 0.5) / std 0.5

    batch = [{"pixel_values": image, "labels": label} for image, label in zip(images, labels, strict=True)]
    arguments = TrainingArguments(
        str(scratch),
        max_steps=2,
        per_device_train_batch_size=len(batch),
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        learning_rate=1e-2,
        disable_tqdm=True,
    )
    before = model.timm_model.fc.weight.detach().clone()
    Trainer(model=model, args=arguments, train_dataset=batch).train()
    assert not torch.equal(before, model.timm_model.fc.weight), "the Trainer changed nothing"
    sys.stdout.write("transformers\n")


def segment() -> None:
    import segmentation_models_pytorch as smp

    model = smp.Unet("tu-gac_msresnet18", encoder_weights=None, encoder_depth=5, classes=2)
    masks = model(torch.randn(2, 3, 64, 64))
    masks.sum().backward()
    stem = next(parameter for name, parameter in model.encoder.named_parameters() if name.endswith("conv1.weight"))
    assert masks.shape == (2, 2, 64, 64) and stem.grad is not None and stem.grad.abs().sum() > 0
    sys.stdout.write("segmentation_models_pytorch\n")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("repo_id")
    parser.add_argument("expected", type=Path)
    parser.add_argument("revision")
    options = parser.parse_args()
    kept = load_file(options.expected)
    images, labels, expected = kept["images"], kept["labels"], kept["logits"]
    assert timm_gac.__version__

    for name in (options.repo_id, f"{options.repo_id}@{options.revision}"):
        model = timm.create_model(f"hf-hub:{name}", pretrained=True).eval()
        with torch.no_grad():
            assert torch.equal(model(images), expected), name
    sys.stdout.write("timm\n")
    assert cli.main(["verify", options.repo_id]) == 0
    fine_tune_with_accelerate(model, images, labels)
    if importlib.util.find_spec("transformers"):
        # A torchaudio built for another CUDA than torch makes transformers unimportable; no model here needs it.
        sys.modules["torchaudio"] = None  # type: ignore[assignment]
        compare_with_transformers(options.repo_id, images, expected, options.expected.parent / "trainer", labels)
    if importlib.util.find_spec("segmentation_models_pytorch"):
        segment()


if __name__ == "__main__":
    main()
