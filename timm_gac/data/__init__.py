"""Images for training and evaluation: small ones whole on the device, others streamed through timm."""

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
