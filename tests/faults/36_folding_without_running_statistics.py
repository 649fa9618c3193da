"""fuse_for_inference and quantize document ValueError for norms without running statistics; it is AttributeError.

"'NoneType' object has no attribute 'double'", after the test-time adaptation recipe (TENT: track_running_stats=False,
running_mean=None). Right: the documented sentence.
"""

import sys

import timm
from torch import nn

import timm_gac

bad = []
for fold in (timm_gac.fuse_for_inference, timm_gac.quantize):
    model = timm.create_model("test_gac_msresnet", num_classes=10)
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm2d, timm_gac.BatchNormLIF)):
            module.track_running_stats, module.running_mean, module.running_var = False, None, None
    try:
        fold(model)
    except ValueError:
        continue
    except AttributeError as error:
        bad.append(f"{fold.__name__}: AttributeError: {error}")
print("\n".join(bad) or "ok")
sys.exit(bool(bad))
