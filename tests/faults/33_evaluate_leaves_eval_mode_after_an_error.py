"""`evaluate` promises "put into eval mode for the duration", but an error (a worker that died, Ctrl-C) leaves it so.

Whoever catches it and trains on does so in eval mode, without batch statistics, in silence. Right: the mode is restored
in a finally, as the hooks are.
"""

import contextlib
import sys

import timm
import torch

import timm_gac  # noqa: F401
from timm_gac.analysis.evaluate import evaluate


def batches():
    yield torch.randn(2, 3, 32, 32), torch.zeros(2, dtype=torch.long)
    raise OSError("a worker died")


model = timm.create_model("test_gac_msresnet", num_classes=10).train()
with contextlib.suppress(OSError):
    evaluate(model, batches())
print("training mode after the error:", model.training)
sys.exit(not model.training)
