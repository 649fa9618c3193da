"""Gated attention coding and spiking ResNets for timm: importing this package registers the models."""

import importlib
import sys
from itertools import pairwise
from pathlib import PurePath
from typing import TYPE_CHECKING, Any


def _is_command_line() -> bool:
    """Whether this very process is ``timm-gac`` or ``python -m timm_gac.cli``."""
    program = sys.argv[0] if sys.argv else ""
    if program == "-m":  # Python still looks for the module
        return ("-m", "timm_gac.cli") in pairwise(sys.orig_argv)
    # A process spawned by the command line has its sys.argv too, but was started otherwise.
    return PurePath(program).name in ("timm-gac", "timm-gac.exe") and program in sys.orig_argv


# PyTorch and timm take seconds to import, and `timm-gac --help` needs neither: the command line's own process imports
# them when a command runs, or when a public name is asked for (by a reload, during which `_waits` is False).
_waits = "_waits" not in globals() and _is_command_line()

if TYPE_CHECKING or not _waits:
    from gac_kernels import CIFAR, IMAGENET, LIFSpec, use_backend

    from . import models as models
    from .inference.fold import fuse_for_inference
    from .inference.quantize import quantize
    from .layers.encoder import DirectCoding, GatedAttentionCoding
    from .layers.lif import LIF
    from .layers.neuron import BatchNormLIF
    from .layers.parameter_groups import parameter_groups
    from .runtime.graphed import graphed, ungraphed
    from .runtime.graphs import GraphedStep

if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        if not _waits or name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        importlib.reload(sys.modules[__name__])
        return globals()[name]


__version__ = "0.1.0"  # the one place: pyproject.toml reads it

__all__ = [
    "CIFAR",
    "IMAGENET",
    "LIF",
    "BatchNormLIF",
    "DirectCoding",
    "GatedAttentionCoding",
    "GraphedStep",
    "LIFSpec",
    "__version__",
    "fuse_for_inference",
    "graphed",
    "parameter_groups",
    "quantize",
    "ungraphed",
    "use_backend",
]
