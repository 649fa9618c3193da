"""``timm-gac train``."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["train"]


def train(arguments: Sequence[str]) -> int:
    """Train a network by a recipe; any field of it can be changed.

    Args:
        arguments: A recipe and options, see `timm_gac.train.options`.
    """
    from ..train.options import parse

    recipe, options = parse(arguments, "timm-gac train")
    from .. import models as models  # registers them, which the console script's process has not done yet
    from ..train.loop import train as run

    return run(recipe, options)
