"""In training mode forward hooks on neurons and shortcuts are never called; in eval mode the same hooks are.

A block with a shortcut goes through `_training_pass`, which calls bn2.training_pass and downsample[0] instead of the
modules; with set_spike_packing(True) bn1 too. Someone who adds up spikes by hooks for a firing-rate loss (as with
SpikingJelly's monitors) silently misses these layers. Right: every hook that is called in eval mode is called in
training too, forward pre-hooks and full backward hooks included.

Of the same kind: the LIF inside each BatchNormLIF is found by isinstance(m, timm_gac.LIF) but called in no mode, so
SpikingJelly's monitor.OutputMonitor(model, timm_gac.LIF) lists 7 layers and records 1.
"""

import sys

import timm
import torch

import timm_gac  # noqa: F401


def called(model, mode, x):
    model.train(mode == "train")
    seen, handles = set(), []
    for name, module in model.named_modules():
        if name:
            handles.append(module.register_forward_hook(lambda m, i, o, n=name: seen.add(n)))
    model(x)
    [h.remove() for h in handles]
    return seen


bad = []
for name, side, packed in (
    ("test_gac_msresnet", 32, False),
    ("test_gac_msresnet", 32, True),
    ("spiking_resnet18", 64, False),
):
    model = timm.create_model(name, num_classes=10)
    x = torch.randn(2, 3, side, side)
    right = called(model, "eval", x)
    model.set_spike_packing(packed)
    missing = right - called(model, "train", x)
    if missing:
        bad.append(f"{name}, packed={packed}: hooks not called in training on {sorted(missing)}")
print("\n".join(bad) or "ok")
sys.exit(bool(bad))
