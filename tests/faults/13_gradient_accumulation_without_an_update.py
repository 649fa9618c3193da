"""With more accumulation steps than a run has steps, the trainer reports "done" and has never updated a weight.

Right: gradients that are left at the end of the run (or epoch) make a last update, or such a recipe is refused. The
remainder is dropped in every run whose steps are no multiple of grad_accumulation.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from timm_gac.train.loop import RunOptions, Trainer
from timm_gac.train.recipes import Recipe

tmp = Path(tempfile.mkdtemp())
images = np.random.default_rng(0).integers(0, 255, (32, 3, 16, 16), dtype=np.uint8)
np.savez(tmp / "d.npz", x_train=images, y_train=np.arange(32) % 2, x_test=images, y_test=np.arange(32) % 2)
recipe = Recipe(
    model="test_gac_msresnet",
    data=str(tmp / "d.npz"),
    epochs=1,
    batch_size=8,
    num_steps=1,
    grad_accumulation=8,
    warmup_epochs=0,
)
try:
    trainer = Trainer(recipe, RunOptions(out=tmp / "run", cpu=True))
except ValueError:
    sys.exit(0)
before = {n: p.detach().clone() for n, p in trainer.state.network.named_parameters()}
trainer.run()
same = all(torch.equal(p, before[n]) for n, p in trainer.state.network.named_parameters())
print("no weight has changed after 4 steps at lr 0.1 with grad_accumulation 8" if same else "ok")
sys.exit(same)
