"""The command line ``timm-gac``: one file a command, each light enough that its help needs no PyTorch."""

from .main import main

__all__ = ["main"]
