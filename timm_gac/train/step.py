"""A training step: forward, loss, backward, clipping, update and moving average, eagerly or as one CUDA graph."""

from __future__ import annotations

import math
import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from gac_kernels import compile_ahead

from ..runtime.collectives import average_gradients
from ..runtime.first_call import SWITCH, may_compile_ahead
from ..runtime.graphs import GraphedStep
from .distill import Teacher, distillation_loss
from .optim import MovingAverage, learning_rate, set_learning_rate
from .recipes import Recipe


class PerStepLogits(nn.Module):
    """A network whose ``forward`` is ``forward_steps``: DDP needs that call to be ``forward``.

    Args:
        network: Network with ``forward_steps``.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) to logits (B, T, classes)."""
        return self.network.forward_steps(images)  # type: ignore[operator]


def tet_loss(steps: Tensor, targets: Tensor, share: float, threshold: float) -> Tensor:
    """Loss of temporal efficient training: the mean cross entropy of all time steps (Deng et al., ICLR 2022).

    Args:
        steps: Logits (B, T, classes).
        targets: Probabilities (B, classes).
        share: Weight of the regulariser, the mean squared distance of the logits from ``threshold``.
        threshold: Threshold of the neurons.
    """
    num_steps = steps.shape[1]
    loss = F.cross_entropy(steps.flatten(0, 1), targets.repeat_interleave(num_steps, 0))
    return (1.0 - share) * loss + share * (steps - threshold).square().mean()


class TrainStep:
    """Runs training steps and sums up loss and matches on the device, so that no step waits for the host.

    Several processes average their gradients in DDP, or with ``cuda_graph`` in one all-reduce within the graph.

    Args:
        accelerator: Accelerator of the run.
        model: The prepared model; it returns mean logits (B, classes), or per-step logits with ``loss='tet'``.
        optimizer: The prepared optimiser, its learning rates in tensors.
        average: Moving average to update, if any.
        recipe: Recipe of the run.
        steps_per_epoch: Steps per epoch, for the schedule.
        threshold: Threshold of the network's neurons, for TET.
        teacher: Teacher to distil from, if any, on the device of the run.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        optimizer: Any,
        average: MovingAverage | None,
        recipe: Recipe,
        steps_per_epoch: int,
        threshold: float,
        teacher: Teacher | None = None,
    ) -> None:
        self.accelerator, self.model, self.optimizer, self.average = accelerator, model, optimizer, average
        self.recipe, self.steps_per_epoch, self.threshold = recipe, steps_per_epoch, threshold
        self.teacher = teacher
        self.sums = torch.zeros(3, dtype=torch.float32, device=accelerator.device)  # loss, matches, images
        self.total_steps = recipe.epochs * steps_per_epoch
        self._last = False
        self._first = True
        self.exchange = recipe.cuda_graph and accelerator.num_processes > 1
        self._run = GraphedStep(self._step) if recipe.cuda_graph else self._step
        self.lr = recipe.lr

    def __call__(self, images: Tensor, targets: Tensor, step: int) -> None:
        """Do step number ``step`` on images (B, C, H, W) and target probabilities (B, classes)."""
        # Asked for by name: tried once, on an H200, where the first step came after 29 s instead of 46.
        asked = os.environ.get(SWITCH) == "train" and images.is_cuda
        if self._first and asked and not self.recipe.compile and self.accelerator.num_processes == 1:
            self._compile_ahead(images, targets)
        self._first = False
        self.lr = learning_rate(self.recipe, step, self.steps_per_epoch)
        set_learning_rate(self.optimizer, self.lr)
        if self.average is not None:
            self.average.set_step(step)
        self._last = step + 1 == self.total_steps
        self._run(images, targets)

    def _accumulate(self) -> AbstractContextManager[None]:
        """Accelerate's gradient accumulation, but that the run's last step always updates the weights."""
        accelerator = self.accelerator
        if self._last and (accelerator.step + 1) % self.recipe.grad_accumulation:
            accelerator.sync_gradients = True
            return nullcontext()
        return accelerator.accumulate(self.model)

    def _complete_mean(self) -> None:
        """Make gradients that were summed over fewer steps than ``grad_accumulation`` their mean over those steps."""
        done = self.total_steps % self.recipe.grad_accumulation
        if self._last and done:
            factor = self.recipe.grad_accumulation / done
            torch._foreach_mul_([p.grad for p in self.model.parameters() if p.grad is not None], factor)

    def _compile_ahead(self, images: Tensor, targets: Tensor) -> None:
        """Compile the kernels of both passes side by side; gradients, buffers and random numbers stay as they were.

        Not where somebody watches the network, who would see these passes.
        """
        if not may_compile_ahead(self.model):
            return
        before = [(buffer, buffer.clone()) for buffer in self.model.buffers()]

        def both_passes() -> None:
            loss, _ = self._loss(images, targets)
            with torch.autograd.set_multithreading_enabled(False):  # only launches of this thread are seen
                loss.backward()
            self.model.zero_grad(set_to_none=True)

        with torch.random.fork_rng([images.device] if images.is_cuda else []):
            compile_ahead(both_passes, images.device)
        with torch.no_grad():
            for buffer, value in before:
                buffer.copy_(value)
        if images.is_cuda:
            torch.cuda.empty_cache()  # a graph's passes run on a stream that cannot use this memory

    def _loss(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The loss, and the mean logits of all steps."""
        recipe = self.recipe
        with self.accelerator.autocast():
            logits = self.model(images)
            taught = None if self.teacher is None else self.teacher(images)
        logits = logits.float()
        if recipe.loss == "tet":
            loss, mean = tet_loss(logits, targets, recipe.tet_lambda, self.threshold), logits.mean(1)
        else:
            loss, mean = F.cross_entropy(logits, targets), logits
        if taught is not None:
            share = recipe.distill_weight
            loss = (1.0 - share) * loss + share * distillation_loss(logits, taught, recipe.distill_temperature)
        return loss, mean

    def _step(self, images: Tensor, targets: Tensor) -> None:
        with self._accumulate():
            loss, logits = self._loss(images, targets)
            self.accelerator.backward(loss)
            if self.exchange:
                average_gradients(self.model.parameters())
            self._complete_mean()
            if self.recipe.clip_grad and self.accelerator.sync_gradients:
                self.accelerator.clip_grad_norm_(self.model.parameters(), self.recipe.clip_grad)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        if self.average is not None and self.accelerator.sync_gradients:
            self.average.update()
        with torch.no_grad():
            matches = (logits.argmax(1) == targets.argmax(1)).sum()
            count = torch.full_like(loss, len(images))
            self.sums += torch.stack((loss.detach() * count, matches.to(loss.dtype), count))

    def release(self) -> None:
        """Release the CUDA graph, which must not outlive the process group."""
        if isinstance(self._run, GraphedStep):
            self._run.release()

    def read(self, flag: Tensor, *, reset: bool) -> tuple[float, float, float]:
        """Sums over all processes since the last reset, in one transfer from the device.

        Args:
            flag: A scalar on the device to be summed and read with them.
            reset: Begin anew.

        Returns:
            Mean loss, share of images whose largest logit is at their largest target, and the flag; the first two are
            NaN without images.
        """
        sums = self.accelerator.reduce(torch.cat((self.sums, flag[None])), "sum")
        loss, matches, images, flagged = sums.tolist()
        if reset:
            self.sums.zero_()
        return (loss / images, matches / images, flagged) if images else (math.nan, math.nan, flagged)
