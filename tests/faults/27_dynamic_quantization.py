"""torch.ao.quantization.quantize_dynamic on a gac network: AttributeError 'function' object has no attribute 'dtype'.

The encoder reads `self.temporal.fc1.weight.dtype`; a dynamically quantised Linear has a method of that name. Right: the
forward pass does not depend on what kind of Linear stands there (the direct-coding twin works).
"""

import sys
import warnings

import timm
import torch

import timm_gac  # noqa: F401

warnings.simplefilter("ignore")
x = torch.randn(2, 3, 32, 32)
for name in ("msresnet18_cifar", "test_gac_msresnet"):
    model = torch.ao.quantization.quantize_dynamic(timm.create_model(name).eval(), {torch.nn.Linear}, dtype=torch.qint8)
    try:
        model(x)
    except AttributeError as error:
        print(f"{name}: {error}")
        sys.exit(1)
