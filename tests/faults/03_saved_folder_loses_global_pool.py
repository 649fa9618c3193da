"""`save_model_folder`, `save_quantized` and so the trainer drop `global_pool`: the reloaded network answers otherwise.

timm's own save_for_hf keeps it (model_args.global_pool); the product overwrites model_args. Right: a folder rebuilds
the network that was saved, with every pooling that timm offers (config check POOLS knows them), quantised ones too.
"""

import sys
import tempfile
from pathlib import Path

import timm
import torch

import timm_gac
from timm_gac.hub.folder import load_model, save_model_folder, save_quantized

tmp, x, bad = Path(tempfile.mkdtemp()), torch.randn(2, 3, 32, 32), []
for pool in ("max", "avgmax", "catavgmax"):
    torch.manual_seed(0)
    model = timm.create_model("test_gac_msresnet", num_classes=10, global_pool=pool).train()
    with torch.no_grad():
        for _ in range(5):
            model(torch.randn(8, 3, 32, 32))
    model.eval()
    save_model_folder(model, tmp / f"float_{pool}")
    save_quantized(model, tmp / f"int8_{pool}")
    timm.models.save_for_hf(model, tmp / f"timm_{pool}", model_args={"num_steps": 4}, safe_serialization=True)
    own = timm.create_model(f"local-dir:{tmp / f'timm_{pool}'}", pretrained=True).eval()
    with torch.no_grad():
        assert torch.equal(own(x), model(x)), "timm's own folder is right"
        for kind, right in (("float", model), ("int8", timm_gac.quantize(model))):
            try:
                got = load_model(tmp / f"{kind}_{pool}")(x)
                if not torch.allclose(got, right(x), atol=1e-4):
                    gap = (got - right(x)).abs().max()
                    bad.append(f"{kind}, global_pool={pool}: logits differ by {gap:.3g} in silence")
            except ValueError as error:
                bad.append(f"{kind}, global_pool={pool}: {str(error)[:90]}...")
print("\n".join(bad) or "ok")
sys.exit(bool(bad))
