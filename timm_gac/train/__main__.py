"""``python -m timm_gac.train RECIPE``, and with several processes ``accelerate launch -m timm_gac.train RECIPE``."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Train; errors of use are one sentence."""
    from .config import parse
    from .loop import train

    try:
        return train(*parse(arguments))
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2


if __name__ == "__main__":
    sys.exit(main())
