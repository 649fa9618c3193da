"""torch.utils.flop_counter counts folded and quantised networks as it does the float one."""

from __future__ import annotations

import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

from timm_gac import fuse_for_inference, quantize


def flops(model, images):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(images)
    return counter.get_total_flops()


@pytest.mark.parametrize("name", ["test_gac_msresnet", "msresnet18"])
def test_folded_and_quantised_networks_count_as_the_float_one(name):
    small = {"layers": (1, 1, 1, 1), "channels": (8, 8, 16, 16), "stem_width": 8} if name == "msresnet18" else {}
    model = timm.create_model(name, num_classes=10, num_steps=2, **small).eval()
    images = torch.randn(1, 3, 32, 32)
    expected = flops(model, images)
    assert expected > 10**5
    for other in (quantize(model), fuse_for_inference(model)):
        # A folded stem may take a channel of ones along, its bias: one more input channel.
        stem = other.conv1
        extra = 0 if stem.weight.shape[1] == 3 else stem.weight.shape[0] * stem.weight[0, 0].numel()
        positions = (32 // stem.stride[0]) ** 2
        assert flops(other, images) == expected + 2 * extra * positions
