"""Grad-CAM on model.layer3 or model.layer4[-1], the usual target of timm's ResNets, fails: they return a tuple.

(membrane, spikes, None): Captum says "AssertionError: Given input is not a torch.Tensor", pytorch-grad-cam "'tuple'
object has no attribute 'cpu'". Right: a layer of the network whose output is (B, C, H, W) rates and can be watched by
its name (such as a module for the rates before global_pool), and a document that names it; or tuples without None.
"""

import sys

import timm
import torch

import timm_gac  # noqa: F401

model = timm.create_model("test_gac_msresnet", num_classes=10).eval()
x, kept = torch.randn(2, 3, 32, 32), {}
handles = [m.register_forward_hook(lambda m, i, o, n=n: kept.__setitem__(n, o)) for n, m in model.named_modules() if n]
model(x)
rates = model.forward_features(x)
layers = [n for n, o in kept.items() if isinstance(o, torch.Tensor) and o.shape == rates.shape]
print("output of layer3:", [type(o).__name__ for o in kept["layer3"]])
print("modules whose output is the rates (B, C, H, W):", layers or "none")
sys.exit(not layers and any(o is None for o in kept["layer3"]))
