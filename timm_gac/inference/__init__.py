"""Networks made faster or smaller for inference, and what runs them: folding, 8-bit weights, early exit, recording."""

from . import flops as flops  # so that PyTorch counts the operators here
