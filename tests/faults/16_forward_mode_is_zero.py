"""Forward-mode derivatives (torch.func.jvp, forward_ad, jacfwd) through any op are 0 or None, without an error.

Right: the Jacobian-vector product that backward mode gives, or an error: PyTorch's own ops without a forward formula
raise "Trying to use forward AD with ... that does not support it".
"""

import sys

import timm
import torch
import torch.autograd.forward_ad as forward_ad

import timm_gac  # noqa: F401
from gac_kernels import CIFAR, firing_rate, lif, norm_lif, pad_frames, pool_frames

bad, x = [], torch.rand(4, 3, 5, 5)
ops = {
    "lif": lambda t: lif(t, CIFAR),
    "norm_lif": lambda t: norm_lif(t, torch.zeros(3), torch.ones(3), 4),
    "firing_rate": lambda t: firing_rate(t, 4),
    "pad_frames": lambda t: pad_frames(t, 1, 2),
    "pool_frames": lambda t: pool_frames(t)[0],
}
for name, op in ops.items():
    z = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(op(z).sum(), z)
    want = g.sum()  # derivative of the sum along the ones
    try:
        got = torch.func.jvp(lambda t, op=op: op(t).sum(), (x,), (torch.ones_like(x),))[1]
        with forward_ad.dual_level():
            tangent = forward_ad.unpack_dual(op(forward_ad.make_dual(x, torch.ones_like(x)))).tangent
        if abs(got - want) > 1e-3 * abs(want):
            bad.append(f"{name}: torch.func.jvp {got:.3g}, backward mode {want:.3g}; forward_ad tangent {tangent}")
    except (NotImplementedError, RuntimeError):
        pass
model = timm.create_model("test_gac_msresnet", num_classes=10).eval()
try:
    images = torch.randn(1, 3, 32, 32)
    value = torch.func.jvp(model, (images,), (torch.ones_like(images),))[1]
    if not value.any():
        bad.append("jvp of a whole network: 0")
except (NotImplementedError, RuntimeError):
    pass
print("\n".join(bad) or "ok")
sys.exit(bool(bad))
