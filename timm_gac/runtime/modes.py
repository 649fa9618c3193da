"""Training and eval mode of a network's modules."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def restored_modes(model: nn.Module) -> Iterator[None]:
    """Give every module the mode that it had before, at the end of ``with`` and after an error.

    A network in training mode may have frozen parts in eval mode, which ``model.train()`` would not restore.
    """
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put a network into eval mode within ``with``; see `restored_modes`."""
    with restored_modes(model):
        model.eval()
        yield
