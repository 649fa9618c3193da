"""torch.func.grad, vjp, jacrev and per-sample gradients (vmap of grad) fail on every network.

"In order to use an autograd.Function with functorch transforms, it must override the setup_context staticmethod": an
internal of `norm_lif`, whose autograd function has none. timm's ResNets work in eval mode. Right: the gradients of
autograd, per sample as in a loop.
"""

import sys

import timm
import torch
import torch.nn.functional as F
from torch.func import functional_call, grad, jacrev, vjp, vmap

import timm_gac  # noqa: F401

torch.manual_seed(0)
model = timm.create_model("test_gac_msresnet", num_classes=10).train()
with torch.no_grad():
    for _ in range(30):
        model(torch.randn(16, 3, 32, 32))
model.eval()
x, y = torch.randn(3, 3, 32, 32), torch.tensor([1, 2, 3])
params = {k: v.detach() for k, v in model.named_parameters()}
buffers = dict(model.named_buffers())


def loss(p, images, labels):
    return F.cross_entropy(functional_call(model, (p, buffers), (images,)), labels)


F.cross_entropy(model(x), y).backward()
right = {k: v.grad for k, v in model.named_parameters()}


def close(got):
    return all(torch.allclose(got[k], right[k], atol=1e-5) for k in right)


trials = {
    "grad": lambda: close(grad(loss)(params, x, y)),
    "vjp": lambda: vjp(model, x)[1](torch.ones(3, 10))[0].shape == x.shape,
    "jacrev": lambda: jacrev(lambda t: model(t[None])[0])(x[0]).shape == (10, 3, 32, 32),
    "per-sample gradients": lambda: close(
        {
            k: v.mean(0)
            for k, v in vmap(grad(lambda p, i, t: loss(p, i[None], t[None])), (None, 0, 0))(params, x, y).items()
        }
    ),
}
bad = []
for name, trial in trials.items():
    try:
        if not trial():
            bad.append(f"{name}: wrong values")
    except RuntimeError as error:
        bad.append(f"{name}: {str(error)[:120]}")
print("\n".join(bad) or "ok")
sys.exit(bool(bad))
