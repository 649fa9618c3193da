"""The quickstart notebook runs from top to bottom, learns, and gets back what it saved."""

from __future__ import annotations

from pathlib import Path

import nbformat
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).resolve().parents[1] / "examples" / "quickstart.ipynb"
SMALL = "STEPS, BATCH, TEST = 4, 8, 20"


def test_quickstart_runs(tmp_path: Path) -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.outputs for cell in code] == [[]] * len(code), "clear the outputs before committing"
    (parameters,) = [cell for cell in code if "parameters" in cell.metadata.get("tags", [])]
    parameters.source += f"\n{SMALL}"
    NotebookClient(notebook, timeout=240, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()
    printed = "".join(output.get("text", "") for cell in code for output in cell.outputs)
    assert "12,679,348 parameters, 4 time steps" in printed
    assert "(2, 4, 100) = images, time steps, classes" in printed
    assert "['config.json', 'model.safetensors'] same logits: True" in printed
    assert sum(output.output_type == "display_data" for cell in code for output in cell.outputs) == 1  # the raster
