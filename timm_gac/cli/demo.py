"""``timm-gac demo``; what it does is in `digits`."""

from __future__ import annotations

from .demo_config import DemoConfig
from .output import check_packages
from .sources import Options


def demo(config: Options[DemoConfig]) -> int:
    """Train a small network on handwritten digits in a minute.

    It is then saved, reloaded and compared, and its spikes are drawn. Status 1 where it reads under 95 % of the digits
    that it has not seen.

    Example: timm-gac demo --out demo

    Args:
        config: How to train it.
    """
    check_packages("matplotlib", "sklearn", "accelerate")  # before PyTorch, whose import takes seconds
    from .digits import run_demo

    return run_demo(config)
