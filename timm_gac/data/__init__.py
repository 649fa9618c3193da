"""Images for training and evaluation: small ones whole on the device, others streamed through timm.

The names are imported when they are first asked for: recipes need `Augmentation` alone, and their help no PyTorch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .arrays import ImageArrays, load_arrays
    from .augment import Augmentation
    from .loader import DeviceLoader
    from .stream import StreamLoader, create_stream_loaders
    from .testset import open_test_set

__all__ = [
    "Augmentation",
    "DeviceLoader",
    "ImageArrays",
    "StreamLoader",
    "create_stream_loaders",
    "load_arrays",
    "open_test_set",
]

_MODULES = {
    "Augmentation": "augment",
    "DeviceLoader": "loader",
    "ImageArrays": "arrays",
    "StreamLoader": "stream",
    "create_stream_loaders": "stream",
    "load_arrays": "arrays",
    "open_test_set": "testset",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)
