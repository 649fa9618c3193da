"""`timm-gac predict` shows class names and file names through rich's markup: what stands in brackets vanishes.

"[unknown]" is shown as nothing, "dog[brown]" as "dog", the file "cat[old].png" as "cat.png"; "[/x]" ends in a traceback
(MarkupError). Right: names as they are (rich.text.Text, escape or markup=False), in every command.
"""

import io
import json
import sys
import tempfile
from pathlib import Path

import timm
from PIL import Image
from rich.console import Console

import timm_gac  # noqa: F401
from timm_gac.cli.predict import PredictConfig, run_predict
from timm_gac.hub.folder import save_model_folder, write_config

tmp, bad = Path(tempfile.mkdtemp()), []
save_model_folder(timm.create_model("test_gac_msresnet", num_classes=2, num_steps=1), tmp / "m")
config = json.loads((tmp / "m/config.json").read_text())
Image.new("RGB", (32, 32)).save(tmp / "cat[old].png")
for names in (["[unknown]", "dog[brown]"], ["[/x]", "cat"]):
    write_config(tmp / "m/config.json", config | {"label_names": names})
    out = io.StringIO()
    try:
        run_predict(
            [tmp / "cat[old].png"], PredictConfig(model=str(tmp / "m")), Console(file=out, width=200, soft_wrap=True)
        )
        bad += [f"not in the output: {word!r}" for word in (*names, "cat[old].png") if word not in out.getvalue()]
    except Exception as error:
        bad.append(f"{names}: {type(error).__name__}: {error}")
print("\n".join(bad) or "ok")
sys.exit(bool(bad))
