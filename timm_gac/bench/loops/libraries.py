"""Loops of other libraries, written as their users write them: accelerate, transformers' Trainer, Lightning.

Each keeps the optimiser and the settings that its documentation begins with.
"""

from __future__ import annotations

import importlib.util
import logging
import tempfile
from typing import Any

import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ..networks import Unavailable
from .clock import Ticks
from .ours import LR, Settings


def accelerate_loop(network: nn.Module, batches: DataLoader[Any], settings: Settings) -> None:
    """The training loop of examples/finetune.py."""
    _require("accelerate")
    from accelerate import Accelerator

    precision = {"bfloat16": "bf16", "float32": "no"}[settings.precision]
    _forget_accelerator()  # one process, several runs
    accelerator = Accelerator(mixed_precision=precision, cpu=settings.device.type == "cpu")
    optimizer: Any = create_optimizer_v2(network, opt="adamw", lr=LR, weight_decay=0.05)
    schedule: Any = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=len(batches))
    model, optimizer, loader, schedule = accelerator.prepare(network, optimizer, batches, schedule)
    model.train()
    for images, labels in loader:
        accelerator.backward(F.cross_entropy(model(images), labels))
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    accelerator.free_memory()
    _forget_accelerator()


def _forget_accelerator() -> None:
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)


class Classifier(nn.Module):
    """A network with the loss inside, as transformers' Trainer wants it.

    Args:
        network: Images ``(B, C, H, W)`` to logits.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Loss and logits."""
        logits = self.network(images)
        return {"loss": F.cross_entropy(logits.float(), labels), "logits": logits}


def trainer_loop(network: nn.Module, batches: DataLoader[Any], settings: Settings) -> None:
    """The Trainer of transformers, with its own AdamW and gradient clipping, without checkpoints and logs."""
    _require("transformers", "accelerate")
    import transformers

    on_cpu = settings.device.type == "cpu"

    class ResidentTrainer(transformers.Trainer):
        def get_train_dataloader(self) -> Any:
            return self.accelerator.prepare(batches)

    class StopWithTheClock(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = _ticks(batches).clock.over

    _forget_accelerator()
    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            output_dir=folder,
            max_steps=len(batches),
            per_device_train_batch_size=settings.batch,
            learning_rate=LR,
            bf16=settings.precision == "bfloat16",
            use_cpu=on_cpu,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
        )
        trainer = ResidentTrainer(
            Classifier(network), arguments, train_dataset=batches.dataset, callbacks=[StopWithTheClock()]
        )
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
    _forget_accelerator()


def lightning_loop(network: nn.Module, batches: DataLoader[Any], settings: Settings) -> None:
    """Lightning's Trainer with AdamW, without checkpoints and logs."""
    _require("pytorch_lightning")
    import pytorch_lightning

    class Module(pytorch_lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
            images, labels = batch
            return F.cross_entropy(self.network(images), labels)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=LR)

    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    with tempfile.TemporaryDirectory() as folder:
        trainer = pytorch_lightning.Trainer(
            accelerator="cpu" if settings.device.type == "cpu" else "gpu",
            devices=1,
            precision={"bfloat16": "bf16-mixed", "float32": "32-true"}[settings.precision],
            max_epochs=1,
            default_root_dir=folder,
            **quiet,
        )
        trainer.fit(Module(), train_dataloaders=batches)


def _require(*packages: str) -> None:
    for package in packages:
        if importlib.util.find_spec(package) is None:
            name = package.replace("_", "-")
            raise Unavailable(f"{name} is not installed: pip install {name}")


def _ticks(batches: DataLoader[Any]) -> Ticks:
    sampler = batches.batch_sampler
    assert isinstance(sampler, Ticks)
    return sampler
