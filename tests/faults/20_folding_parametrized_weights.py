"""fuse_for_inference and quantize on pruned, weight- or spectral-normalised convolutions: crash, or other weights.

Folding scales `conv.weight` in place, which with torch.nn.utils.parametrizations is a temporary: the scale is lost, and
`quantize` goes on with unscaled weights. With torch.nn.utils.prune and in fuse it is "cannot assign
'torch.FloatTensor' as parameter 'weight'". Right: the effective weight is folded (as after prune.remove /
remove_parametrizations), or a ValueError asks for that.
"""

import copy
import sys

import timm
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import timm_gac

torch.manual_seed(0)
model = timm.create_model("test_gac_msresnet", num_classes=10).train()
with torch.no_grad():
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm2d, timm_gac.BatchNormLIF)) and module.affine:
            module.weight.uniform_(0.5, 2.0)
    for _ in range(40):
        model(torch.randn(16, 3, 32, 32))
model.eval()
x, bad = torch.randn(4, 3, 32, 32), []


def inner(network):
    return [
        m for n, m in network.named_modules() if isinstance(m, nn.Conv2d) and ".conv" in n and n.startswith("layer")
    ]


def pruned(network):
    for conv in inner(network):
        prune.l1_unstructured(conv, "weight", 0.3)


def bake_pruned(network):
    for conv in inner(network):
        prune.remove(conv, "weight")


def normed(network):
    for conv in inner(network):
        parametrizations.weight_norm(conv)


def bake_normed(network):
    for conv in inner(network):
        parametrize.remove_parametrizations(conv, "weight")


for kind, wrap, bake in (("prune", pruned, bake_pruned), ("parametrizations.weight_norm", normed, bake_normed)):
    for make in (timm_gac.fuse_for_inference, timm_gac.quantize):
        plain, wrapped = copy.deepcopy(model), copy.deepcopy(model)
        wrap(plain), bake(plain), wrap(wrapped)
        with torch.no_grad():
            wrapped(x)
            right = make(plain)(x)
            try:
                got = make(wrapped)(x)
                if not torch.allclose(got, right, atol=1e-4):
                    bad.append(f"{make.__name__}, {kind}: logits off by {(got - right).abs().max():.2f}, no error")
            except ValueError:
                pass
            except (TypeError, RuntimeError) as error:
                bad.append(f"{make.__name__}, {kind}: {type(error).__name__}: {str(error)[:90]}")
print("\n".join(bad) or "ok")
sys.exit(bool(bad))
