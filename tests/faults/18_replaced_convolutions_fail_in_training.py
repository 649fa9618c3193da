"""Networks whose convolutions were replaced (weight standardisation, adapters, QAT) work in eval mode, not in training.

TypeError: Conv2d.forward() takes 2 positional arguments but 3 were given: blocks with a shortcut call
conv(spikes, bits) in training. Right: without packed spikes a block calls conv(spikes), as it does in eval mode.
"""

import sys

import timm
import torch
from torch import nn

import timm_gac  # noqa: F401

model = timm.create_model("test_gac_msresnet", num_classes=10)
for name, old in list(model.named_modules()):
    if isinstance(old, nn.Conv2d):
        parent, _, child = name.rpartition(".")
        new = nn.Conv2d(old.in_channels, old.out_channels, old.kernel_size, old.stride, old.padding, bias=False)
        new.load_state_dict(old.state_dict())
        setattr(model.get_submodule(parent), child, new)
x = torch.randn(2, 3, 32, 32)
assert model.eval()(x).shape == (2, 10)
try:
    model.train()(x).sum().backward()
except TypeError as error:
    print("training:", error)
    sys.exit(1)
