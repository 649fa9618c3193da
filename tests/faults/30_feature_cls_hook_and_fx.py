"""features_only=True with timm's feature_cls='hook' or 'fx' (FeatureGraphNet) silently gives other features.

Instead of firing rates (B, C, H, W) come currents or spikes with time folded into the batch, (T*B, C, H, W), and
(T, B, C, H, W) for the encoder; with 'list' and 'dict' it is a TypeError about a missing argument. Right: firing rates
as with the default 'getter', or a sentence that only 'getter' fits.
"""

import sys

import timm
import torch

import timm_gac  # noqa: F401

x, bad = torch.randn(2, 3, 32, 32), []
torch.manual_seed(0)
with torch.no_grad():
    right = timm.create_model("test_gac_msresnet", features_only=True).eval()(x)
for kind in ("hook", "fx", "list", "dict"):
    torch.manual_seed(0)
    try:
        with torch.no_grad():
            got = timm.create_model("test_gac_msresnet", features_only=True, feature_cls=kind).eval()(x)
        got = list(got.values()) if isinstance(got, dict) else got
        shapes = [tuple(a.shape) for a in got]
        if shapes != [tuple(a.shape) for a in right]:
            bad.append(f"{kind}: shapes {shapes}")
    except (ValueError, NotImplementedError, AssertionError):
        pass
    except TypeError as error:
        bad.append(f"{kind}: TypeError: {error}")
print("\n".join(bad) or "ok")
sys.exit(bool(bad))
