"""LIFSpec takes a tensor or nn.Parameter as decay, threshold or width, and it never learns: no error, no gradient.

snnTorch (learn_beta) and SpikingJelly (ParametricLIFNode) users try that. Right: a sentence that a spec holds plain
numbers (numpy's and 0-d tensors without gradient may be converted), or a gradient.
"""

import sys

import torch
from torch import nn

from timm_gac import LIF, LIFSpec

bad = []
for field, value in (("decay", 0.5), ("threshold", 1.0), ("width", 1.0)):
    parameter = nn.Parameter(torch.tensor(value))
    try:
        neuron = LIF(LIFSpec(**{field: parameter}))
    except (ValueError, TypeError):
        continue
    neuron(torch.randn(4, 50).requires_grad_()).sum().backward()
    if parameter.grad is None:
        bad.append(f"LIFSpec({field}=nn.Parameter): accepted, gradient None")
print("\n".join(bad) or "ok")
sys.exit(bool(bad))
