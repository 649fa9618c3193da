"""set_grad_checkpointing(True) updates the running statistics of all blocks twice a step.

The recomputation in the backward pass runs batch norm in training again, so momentum 0.1 acts as 0.19 and
num_batches_tracked doubles (cumulative averages, momentum=None, are wrong). SpikingJelly's users report the same of
membranes. Right: statistics after a step are those without checkpointing; gradients are the same already.
"""

import copy
import sys

import timm
import torch

import timm_gac  # noqa: F401

torch.manual_seed(0)
plain = timm.create_model("test_gac_msresnet", num_classes=10).train()
checked = copy.deepcopy(plain)
checked.set_grad_checkpointing(True)
x = torch.randn(8, 3, 32, 32)
for model in (plain, checked):
    model(x).sum().backward()
a, b = plain.state_dict(), checked.state_dict()
bad = [k for k in a if ("running" in k or "tracked" in k) and not torch.allclose(a[k].float(), b[k].float())]
print(f"{len(bad)} running statistics differ, such as", bad[:4])
sys.exit(bool(bad))
