"""An inspection as one HTML page with its pictures inside: it works offline and on a phone."""

from __future__ import annotations

import base64
from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any

from ...runtime.files import write_csv, write_json, write_text
from .figures import (
    NEURONS,
    draw_answer,
    draw_gate,
    draw_health,
    draw_membranes,
    draw_raster,
    draw_rates,
)
from .neurons import COLUMNS, draw_neurons, has_learned, neuron_rows
from .record import Inspection

_STYLE = """
:root{color-scheme:light}
body{font:16px/1.5 system-ui,sans-serif;color:#1c2733;background:#fff;margin:0 auto;padding:1rem;max-width:44rem}
h1{font-size:1.45rem;line-height:1.25;margin:.2rem 0 .6rem;overflow-wrap:anywhere}
h2{font-size:1.15rem;margin:2rem 0 .2rem}
p{margin:.3rem 0 .6rem}
img{display:block;width:100%;height:auto}
.note{color:#5a6672;font-size:.92rem}
.wide{overflow-x:auto}
table{border-collapse:collapse;font-size:.86rem;width:100%}
th,td{padding:.25rem .5rem;text-align:right;border-bottom:1px solid #e3e8ee;white-space:nowrap}
th:first-child,td:first-child{text-align:left}
"""
# What JSON says of a layer.
LAYER_FIELDS = (
    *("name", "rate", "step_rates", "neurons", "dead", "saturated", "dead_channels", "channels"),
    *("decay", "threshold"),
)
# By file name: heading, what it shows, and what draws it (None where there is nothing to draw).
FIGURES: dict[str, tuple[str, str, Callable[[Inspection], Any]]] = {
    "answer": (
        "Answer, step by step",
        "The picture as the network sees it, and the likeliest classes from the mean logits of the first t steps.",
        draw_answer,
    ),
    "gate": (
        "Gate of the encoder",
        "Gated attention coding multiplies the spikes of the encoder by sigmoid(m·n): m one score a time step, n one a "
        "pixel and channel. Heat maps lie over the picture.",
        draw_gate,
    ),
    "raster": (
        "Spikes",
        f"One column a time step, one line a neuron: {NEURONS} of each layer, spread over those that fire. Of the "
        "encoder, gated spikes that are not 0.",
        draw_raster,
    ),
    "rates": ("Firing rate by layer and step", "Spikes per neuron and time step, mean over the images.", draw_rates),
    "membranes": (
        "Membranes against the threshold",
        "Potentials before the reset in units of the threshold, log scale, outermost bins with what lies beyond. Right "
        "of the line a neuron fires.",
        draw_membranes,
    ),
    "health": (
        "Dead and saturated neurons",
        "Dead: no spike in any image at any step. Saturated: a spike in every image at every step. With few images "
        "many neurons look dead that are not: give a folder or a data set to judge.",
        draw_health,
    ),
    "neurons": (
        "Decay and threshold by layer",
        "What the neurons learned, beside where they began. Of layers that learned one of each a channel: the range, "
        "the middle half and the median of the channels. Numbers: values or medians. All are in neurons.csv.",
        draw_neurons,
    ),
}
# What the page says where there is nothing to draw; a figure that is not here is left out with its heading.
ABSENT = {"gate": "None: this network codes directly, every step sees the same real-valued image."}


def inspection_dict(inspection: Inspection) -> dict[str, Any]:
    """The numbers of an inspection, ready for JSON."""
    return {
        **{name: getattr(inspection, name) for name in ("model", "weights", "num_steps", "images")},
        "layers": [{name: getattr(layer, name) for name in LAYER_FIELDS} for layer in inspection.layers],
        "temporal_score": None if inspection.temporal is None else inspection.temporal.tolist(),
        "gate_mean_by_step": None if inspection.gate is None else inspection.gate.mean((1, 2)).tolist(),
        "likeliest_by_step": inspection.scores.argmax(1).tolist(),
    }


# All that a page may write or, where a network has nothing for it, remove.
NAMES = ("index.html", "inspect.json", "neurons.csv", *(f"{name}.png" for name in FIGURES))


def write_inspection(inspection: Inspection, out: Path) -> list[Path]:
    """Write ``index.html``, ``inspect.json`` and a PNG for each figure; the files, the page first.

    Of a network with learned neurons also ``neurons.csv``: decay and threshold of each layer, or of each channel.

    Args:
        inspection: What to show.
        out: Folder; created if missing.
    """
    out.mkdir(parents=True, exist_ok=True)
    files, sections = [], []
    for name, (heading, caption, draw) in FIGURES.items():
        figure, file = draw(inspection), out / f"{name}.png"
        if figure is None:
            file.unlink(missing_ok=True)  # of an earlier network in this folder
            if name not in ABSENT:
                continue
            body = f'<p class="note">{escape(ABSENT[name])}</p>'
        else:
            figure.savefig(file)
            files.append(file)
            picture = base64.b64encode(file.read_bytes()).decode("ascii")
            body = f'<img alt="{escape(heading)}" src="data:image/png;base64,{picture}">'
        sections.append(f'<h2>{escape(heading)}</h2>\n<p class="note">{escape(caption)}</p>\n{body}')
    table = out / "neurons.csv"
    if has_learned(inspection):
        write_csv(table, COLUMNS, neuron_rows(inspection))
        files.append(table)
    else:
        table.unlink(missing_ok=True)
    page, numbers = out / "index.html", out / "inspect.json"
    write_text(page, _page(inspection, sections))
    write_json(numbers, inspection_dict(inspection))
    return [page, numbers, *files]


def _page(inspection: Inspection, sections: list[str]) -> str:
    title = f"{inspection.model} from inside"
    best = int(inspection.scores[-1].argmax())
    answer = inspection.label_names[best] if inspection.label_names else f"class {best}"
    pictures = "1 image" if inspection.images == 1 else f"{inspection.images:,} images, of which the first is drawn"
    rows = "\n".join(
        f"<tr><td>{escape(layer.name)}</td><td>{layer.neurons:,}</td><td>{layer.rate:.2%}</td><td>{layer.dead:.1%}</td>"
        f"<td>{layer.dead_channels} of {layer.channels}</td><td>{layer.saturated:.2%}</td></tr>"
        for layer in inspection.layers
    )
    lines = [
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<h1>{escape(title)}</h1>",
        f"<p>T = {inspection.num_steps} time steps; weights: {escape(inspection.weights or 'as given')}; "
        f"{pictures}. Answer: <b>{escape(answer)}</b> ({inspection.scores[-1, best]:.0%}).</p>",
        *sections,
        '<h2>Numbers</h2>\n<div class="wide"><table>',
        "<tr><th>layer</th><th>neurons</th><th>rate</th><th>dead</th><th>dead channels</th><th>saturated</th></tr>",
        rows,
        "</table></div>\n</body>\n</html>\n",
    ]
    return "\n".join(lines)
