"""torch.optim.swa_utils.update_bn (SWA, weight averaging, model soups) leaves the batch norms in BatchNormLIF alone.

update_bn finds layers by isinstance(_BatchNorm), which BatchNormLIF is not: they keep stale statistics and only move by
momentum 0.1, while stem and shortcuts are recomputed. Right: after update_bn all running statistics are plain averages
over the loader, as for torch.nn.BatchNorm2d (here: those of timm_gac.hub.open.calibrate on the same batches).
"""

import copy
import sys

import timm
import torch
from torch.optim.swa_utils import AveragedModel, update_bn

import timm_gac  # noqa: F401
from timm_gac.hub.open import calibrate

torch.manual_seed(0)
model = timm.create_model("test_gac_msresnet", num_classes=10).train()
with torch.no_grad():
    model(torch.randn(8, 3, 32, 32) * 5 + 3)  # statistics of an earlier point of the training
batches = [torch.randn(8, 3, 32, 32) for _ in range(4)]
averaged = AveragedModel(model)
right = calibrate(copy.deepcopy(model), batches).state_dict()
update_bn(batches, averaged)
got = averaged.module.state_dict()
bad = [k for k in right if "running" in k and not torch.allclose(got[k], right[k], rtol=1e-3, atol=1e-4)]
print("not brought up to date:", bad or "none")
sys.exit(bool(bad))
