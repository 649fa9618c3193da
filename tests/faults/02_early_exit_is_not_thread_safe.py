"""Early exit on one network from several threads (a web server) gives wrong answers without an error, or errors.

`forward_early_exit` put other forwards into the shared network for the time of a call. Right: answers of
`predict(..., exit_at=...)`, and of a plain forward pass beside it, are those of one thread (or the second caller
waits).
Plain forward passes side by side are right; only early exit is at fault.
"""

import sys
import threading
from collections import Counter

import timm
import torch

import timm_gac  # noqa: F401
from timm_gac.inference.early_exit import forward_early_exit

torch.manual_seed(0)
model = timm.create_model("test_gac_msresnet", num_classes=10).train()
with torch.no_grad():
    for _ in range(20):
        model(torch.randn(16, 3, 32, 32))
model.eval()
model.fc.weight.data *= 20  # logits as large as those of a trained network
inputs = [torch.randn(4, 3, 32, 32) for _ in range(3)]
with torch.no_grad():
    right = {
        "early": [[row.mean(0) for row in forward_early_exit(model, x, 1.0)] for x in inputs],
        "plain": [model(x) for x in inputs],
    }


def early(i):
    return [row.mean(0) for row in forward_early_exit(model, inputs[i], 1.0)]


@torch.no_grad()
def plain(i):
    return model(inputs[i])


def together(*kinds):
    """Calls of these kinds in threads of their own; how each ended."""
    ended, lock = Counter(), threading.Lock()

    def work(kind, i):
        for _ in range(15):
            try:
                got, want = {"early": early, "plain": plain}[kind](i), right[kind][i]
                worst = max(
                    (a - b).abs().max().item() if a.shape == b.shape else 99.0 for a, b in zip(got, want, strict=False)
                )
                how = "right" if worst < 1e-3 and len(got) == len(want) else "WRONG, no error"
            except Exception as error:
                how = f"{type(error).__name__}"
            with lock:
                ended[f"{kind}: {how}"] += 1

    threads = [threading.Thread(target=work, args=(kind, i)) for i, kind in enumerate(kinds)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    return dict(ended)


results = {
    kinds: together(*kinds) for kinds in (("plain", "plain", "plain"), ("early", "early", "early"), ("early", "plain"))
}
for kinds, ended in results.items():
    print(" + ".join(kinds), "->", ended)
sys.exit(any(not key.endswith("right") for ended in results.values() for key in ended))
