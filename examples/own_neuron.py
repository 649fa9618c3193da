"""A neuron and a surrogate of one's own, in the fused kernels: `python examples/own_neuron.py` checks and trains them.

On a machine without a GPU set TRITON_INTERPRET=1 to have their Triton functions checked too.
"""

import timm
import torch
import triton
import triton.language as tl

import timm_gac
from gac_kernels import LIFSpec, Neuron, Surrogate, register_neuron, register_surrogate, surrogate_grad, testing


@triton.jit
def exponential_kernel(d, WIDTH: tl.constexpr):
    return tl.exp(-2.0 * tl.abs(d) / WIDTH) * (1.0 / WIDTH)


EXPONENTIAL = register_surrogate(
    Surrogate(
        name="exponential",
        derivative=lambda d, width: torch.exp(-2 * d.abs() / width) / width,
        kernel=exponential_kernel,
        integral=lambda d, width: 0.5 + 0.5 * d.sign() * (1 - torch.exp(-2 * d.abs() / width)),
    )
)


def step(x, state, n):
    """A synaptic current i that decays by itself, and the membrane v that integrates it."""
    v, i = state
    i = n.constants[0] * i + x
    u = n.decay * v + i
    s = n.spike(u - n.threshold)
    r = n.held(s)
    return s, (u - n.threshold * r if n.soft_reset else u * (1 - r), i)


@triton.jit
def kernel(x, state, THRESHOLD, DECAY, SOFT: tl.constexpr, CONSTANTS: tl.constexpr):
    KEPT: tl.constexpr = CONSTANTS[0]
    i = KEPT * state[1] + x
    u = DECAY * state[0] + i
    s = tl.where(u > THRESHOLD, 1.0, 0.0)
    v = u - THRESHOLD * s if SOFT else u * (1.0 - s)
    return s, (v, i)


@triton.jit
def kernel_grad(
    x,
    state,
    gs,
    gstate,
    THRESHOLD,
    DECAY,
    SURROGATE: tl.constexpr,
    WIDTH: tl.constexpr,
    DETACH: tl.constexpr,
    SOFT: tl.constexpr,
    CONSTANTS: tl.constexpr,
):
    KEPT: tl.constexpr = CONSTANTS[0]
    i = KEPT * state[1] + x
    u = DECAY * state[0] + i
    s = tl.where(u > THRESHOLD, 1.0, 0.0)
    at_spike = gs if DETACH else gs - gstate[0] * (THRESHOLD if SOFT else u)
    gu = at_spike * surrogate_grad(u - THRESHOLD, SURROGATE, WIDTH) + (gstate[0] if SOFT else gstate[0] * (1.0 - s))
    gx = gstate[1] + gu
    return gx, (DECAY * gu, KEPT * gx)


SYNAPTIC = register_neuron(Neuron("synaptic", step, kernel, kernel_grad, states=2, constants=(0.5,)))

if __name__ == "__main__":
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    spec = LIFSpec(neuron="synaptic", surrogate="exponential")
    testing.check_neuron(spec, device)
    print(f"{spec.neuron} and {spec.surrogate} agree with their definitions in {', '.join(testing.backends(device))}")
    network = timm.create_model("test_gac_msresnet", num_classes=10, spec=spec).to(device)
    optimizer = torch.optim.AdamW(timm_gac.parameter_groups(network, weight_decay=0.05), lr=3e-3)
    images, labels = torch.randn(16, 3, 16, 16, device=device), torch.arange(16, device=device) % 10
    for update in range(12):
        loss = torch.nn.functional.cross_entropy(network(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if update % 11 == 0:
            print(f"update {update}: loss {loss.item():.3f}")
