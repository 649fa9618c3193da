"""Frozen batch norms go on changing: by the usual idiom, and in the trainer's own --freeze-stages.

(a) `for m in model.modules(): if isinstance(m, nn.BatchNorm2d): m.eval()` after model.train() reaches stem and
shortcuts only. (b) Recipe.freeze_stages says "keep ... as they are", but the running statistics of the frozen stages
move. Right: (a) no running statistic moves, or the norm in BatchNormLIF can be found and frozen as others are; (b) all
tensors of the frozen stages stay as they were, so that a frozen backbone gives the features it gave.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
import timm
import torch
from torch import nn

import timm_gac  # noqa: F401
from timm_gac.train.loop import RunOptions, Trainer
from timm_gac.train.recipes import Recipe

bad, x = [], torch.randn(8, 3, 32, 32)


def moved(model, step):
    before = {k: v.clone() for k, v in model.state_dict().items()}
    step()
    return [k for k, v in model.state_dict().items() if not torch.equal(v, before[k])]


model = timm.create_model("test_gac_msresnet", num_classes=10).train()
for module in model.modules():
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        module.eval()
drift = [k for k in moved(model, lambda: model(x)) if "running" in k]
if drift:
    bad.append(f"(a) after m.eval() of every _BatchNorm these still move: {drift}")

tmp = Path(tempfile.mkdtemp())
images = np.random.default_rng(0).integers(0, 255, (16, 3, 16, 16), dtype=np.uint8)
np.savez(tmp / "d.npz", x_train=images, y_train=np.arange(16) % 2, x_test=images, y_test=np.arange(16) % 2)
recipe = Recipe(
    model="test_gac_msresnet",
    data=str(tmp / "d.npz"),
    epochs=1,
    batch_size=8,
    num_steps=2,
    freeze_stages=2,
    crop_padding=0,
    flip=False,
    warmup_epochs=0,
)
trainer = Trainer(recipe, RunOptions(out=tmp / "run", cpu=True))
changed = moved(trainer.state.network, trainer.run)
drift = [k for k in changed if k.startswith(("conv1.", "bn1.", "encoder.", "layer1."))]
if drift:
    bad.append(f"(b) --freeze-stages 2 changed {drift}")
print("\n".join(bad) or "ok")
sys.exit(bool(bad))
