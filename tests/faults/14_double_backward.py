"""Second derivatives (gradient penalty, Hessian-vector products) are silently wrong, or crash in the middle of an op.

PyTorch differentiates whatever `lif_backward` and `norm_lif_backward` happen to do: on a CPU a part of it, in Triton
nothing (jvp by double backward and hvp are 0 there), with only PyTorch's general warning. Right: the second derivative
of `lif_reference` (which is twice differentiable), or a refusal that says so
(torch.autograd.function.once_differentiable does).
"""

import sys
import warnings

import timm
import torch

import timm_gac  # noqa: F401
from gac_kernels import CIFAR, lif, lif_reference, norm_lif, norm_lif_reference

warnings.simplefilter("ignore")
bad = []


def refused(error):
    text = str(error)
    return "once_differentiable" in text or "twice" in text or "double backward" in text


def penalty_gradient(f):
    """d/dw of |d sum(f(w x)) / dx|^2."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(8, 50, 1, 1, generator=generator, dtype=torch.float64).requires_grad_()
    w = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    cost = torch.linspace(0, 1, 400, dtype=torch.float64).view(8, 50, 1, 1)
    (gx,) = torch.autograd.grad((f(x * w) * cost).sum(), x, create_graph=True)
    return torch.autograd.grad(gx.square().sum(), w)[0].item()


zeros, ones = torch.zeros(50, dtype=torch.float64), torch.ones(50, dtype=torch.float64)
for name, op, reference in (
    ("lif", lambda x: lif(x, CIFAR), lambda x: lif_reference(x, CIFAR)),
    ("norm_lif", lambda x: norm_lif(x, zeros, ones, 4), lambda x: norm_lif_reference(x, zeros, ones, 4)),
):
    want = penalty_gradient(reference)
    try:
        got = penalty_gradient(op)
        if abs(got - want) > 1e-6 * abs(want):
            bad.append(f"{name}: {got:.6g} instead of {want:.6g}, without an error")
    except RuntimeError as error:
        if not refused(error):
            bad.append(f"{name}: {str(error)[:110]}")
model = timm.create_model("test_gac_msresnet", num_classes=10).eval()
x = torch.randn(2, 3, 32, 32, requires_grad=True)
try:
    (g,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    g.square().sum().backward()
except RuntimeError as error:
    if not refused(error):
        bad.append(f"gradient penalty of a gac network: {str(error)[:120]}")
print("\n".join(bad) or "ok")
sys.exit(bool(bad))
