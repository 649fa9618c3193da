"""``python -m timm_gac.train RECIPE``, and with several processes ``accelerate launch -m timm_gac.train RECIPE``."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def train_by(arguments: Sequence[str], program: str) -> int:
    """Train, or show the recipe, as a command line says; the exit status."""
    from .options import parse, show

    recipe, options = parse(arguments, program)
    if options.show:
        sys.stdout.write(show(options.recipe_name, recipe))
        return 0
    from .. import models as models  # registers them, which the console script's process has not done yet
    from .loop import train

    return train(recipe, options)


def main(arguments: Sequence[str] | None = None) -> int:
    """Train; errors are one sentence and exit status 2."""
    try:
        return train_by(sys.argv[1:] if arguments is None else arguments, "python -m timm_gac.train")
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2


if __name__ == "__main__":
    sys.exit(main())
