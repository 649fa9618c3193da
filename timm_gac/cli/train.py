"""``timm-gac train``."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def train(arguments: Sequence[str]) -> int:
    """Train a network by a recipe; any field of it can be changed.

    Args:
        arguments: A recipe and options, see `timm_gac.train.options`.
    """
    from ..train.__main__ import train_by
    from ..train.recipes import RECIPES
    from .output import nearest

    if arguments and not arguments[0].startswith("-") and not {*arguments} & {*RECIPES}:
        close = nearest(arguments[0], list(RECIPES))
        sys.stderr.write(
            f"timm-gac: expected a recipe first, got {arguments[0]!r}{close}: choose one of {', '.join(RECIPES)}\n"
        )
        raise SystemExit(2)
    return train_by(arguments, "timm-gac train")
