"""NaN in an image gives finite logits and a finite loss, while running statistics become NaN for good.

A comparison with NaN is false, so neurons fall silent instead of passing it on; nothing that watches the loss notices.
timm's ResNet gives NaN logits. Right: some sign of it: NaN in the logits (as pool_frames keeps it), or an error from
the trainer, which checks neither loss nor statistics (its health check reports a silent layer at most).
"""

import sys

import timm
import torch
import torch.nn.functional as F

import timm_gac  # noqa: F401

x, bad = torch.randn(4, 3, 32, 32), []
broken = x.clone()
broken[0, 0, 5, 5] = float("nan")
model = timm.create_model("test_gac_msresnet", num_classes=10).train()
assert timm.create_model("test_resnet", num_classes=10).train()(broken).isnan().any()
loss = F.cross_entropy(model(broken), torch.zeros(4, dtype=torch.long))
poisoned = [k for k, v in model.state_dict().items() if "running" in k and v.isnan().any()]
if loss.isfinite() and poisoned:
    bad.append(f"training: loss {loss.item():.2f}, {len(poisoned)} running statistics are NaN")
logits = model.eval()(x)
if poisoned and logits.isfinite().all():
    bad.append(f"afterwards, on clean images: finite logits, all rows alike: {bool((logits == logits[0]).all())}")
if timm.create_model("test_gac_msresnet", num_classes=10).eval()(broken)[0].isfinite().all():
    bad.append("eval mode: finite logits of the image with NaN")
print("\n".join(bad) or "ok")
sys.exit(bool(bad))
