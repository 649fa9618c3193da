"""``python -m timm_gac.train RECIPE``, and with several processes ``accelerate launch -m timm_gac.train RECIPE``."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Train; errors are one sentence and exit status 2."""
    from .loop import train
    from .options import parse, show

    try:
        recipe, options = parse(sys.argv[1:] if arguments is None else arguments, "python -m timm_gac.train")
        if options.show:
            sys.stdout.write(show(options.recipe_name, recipe))
            return 0
        return train(recipe, options)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2


if __name__ == "__main__":
    sys.exit(main())
