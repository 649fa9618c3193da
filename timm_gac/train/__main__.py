"""``python -m timm_gac.train RECIPE``, and with several processes ``accelerate launch -m timm_gac.train RECIPE``.

``--plugin my_neuron.py`` is taken as by ``timm-gac``: each process imports the file first.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from ..runtime.arguments import refuse_empty
from ..runtime.plugins import import_plugin, take_plugins


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
        given = sys.argv[1:] if arguments is None else arguments
        refuse_empty("python -m timm_gac.train", given)
        plugins, others = take_plugins(given)
        for plugin in plugins:
            import_plugin(plugin)
        return train_by(others, "python -m timm_gac.train")
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2


if __name__ == "__main__":
    sys.exit(main())
