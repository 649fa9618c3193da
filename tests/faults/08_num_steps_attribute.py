"""Setting model.num_steps (or a module's) after creation gives a wrong number of rows, without an error.

Right: either T changes everywhere (the network then computes with that T), or the assignment or the next forward pass
is refused with a sentence. A batch of 4 must never come back as 8 or 2 rows.
"""

import sys

import timm
import torch

import timm_gac  # noqa: F401

bad, x = [], torch.randn(4, 3, 32, 32)
for name in ("test_gac_msresnet", "msresnet18_cifar"):
    for steps in (1, 2, 8):
        model = timm.create_model(name, num_classes=10).eval()  # T = 4
        try:
            model.num_steps = steps
            with torch.no_grad():
                rows, per_step = len(model(x)), tuple(model.forward_steps(x).shape)
            if rows != len(x) or per_step != (len(x), steps, 10):
                bad.append(f"{name}, num_steps=4 -> {steps}: {rows} rows of {len(x)} images, forward_steps {per_step}")
        except (ValueError, AttributeError):
            pass
print("\n".join(bad) or "ok")
sys.exit(bool(bad))
