"""The demonstration Space: a picture on its way through a spiking network, time step by time step.

``python app.py`` serves the first model it finds: --model or GAC_MODEL, published weights, or that of ``make demo``.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import figures
import gradio as gr
import numpy as np
from analysis import Network, open_picture
from PIL import Image

from timm_gac.hub import open_source
from timm_gac.hub.facts import DIGITS

HERE = Path(__file__).resolve().parent
MODELS = HERE.parent / "models"  # beside the Space in a clone
PUBLISHED = "gac_msresnet18_cifar.cifar100"
DEMO = HERE.parents[1] / "demo"
# The gallery gives each column 100 pixels at least, wider than a phone, and keeps an empty third row.
CSS = """
.gradio-container {width: 100% !important; max-width: 760px !important; margin: auto}
#examples .grid-container {grid-template-columns: repeat(5, minmax(0, 1fr)) !important}
#examples .grid-wrap {min-height: 0 !important; height: auto !important; max-height: none !important}
footer {display: none !important}
"""
HEADINGS = {
    "classes": "Likeliest classes",
    "gate": "Gate of the encoder, mean over channels",
    "raster": "Spikes, and firing rate of each layer",
    "energy": "Energy, estimated",
}
ENERGY_NOTE = (
    "Estimated from counted operations at 45 nm (4.6 pJ a multiply-accumulate, 0.9 pJ an accumulate; memory traffic, "
    "norms and neurons left out), not measured on a chip. Layers with real-valued input count as multiply-accumulates, "
    "those with spikes as one accumulate a spike; the ANN runs each layer once, without the gate."
)


def choose_model(wanted: str | None) -> str:
    """The model to serve: the one asked for, else the published weights of a clone, else the demonstration's.

    Raises:
        ValueError: There is none.
    """
    if wanted:
        return wanted
    for folder in (MODELS / PUBLISHED, *sorted(MODELS.glob("*")), DEMO):
        if (folder / "model.safetensors").is_file():
            return str(folder)
    raise ValueError("expected a model, got none: run `make demo` first, or give --model FOLDER or ORG/NAME")


def describe(network: Network) -> str:
    """What is shown about the model, with the limits of a stand-in."""
    facts = network.facts
    dataset = facts.dataset[1] if facts.dataset else "data that its folder does not name"
    accuracy = f", {facts.top1:.2%} of unseen pictures right" if facts.top1 is not None else ""
    channels, height, width = network.config["input_size"]
    text = (
        f"`{facts.architecture}`, {facts.parameters:,} parameters, T = {facts.num_steps} time steps, trained on "
        f"{dataset}{accuracy}. It sees {height}x{width} pixels{' in grey' if channels == 1 else ''}."
    )
    if facts.dataset == DIGITS:
        text += " **A stand-in:** it knows the ten digits only, until the CIFAR-100 weights are published."
    return text


def examples(channels: int) -> list[Image.Image]:
    """Pictures to pick: handwritten digits for networks in grey, two photographs for those in colour."""
    try:
        from sklearn import datasets
    except ModuleNotFoundError:
        return []
    if channels == 1:
        digits = datasets.load_digits()
        chosen = [int(np.flatnonzero(digits.target == digit)[3]) for digit in range(10)]
        return [
            Image.fromarray((255 - digits.images[index] * 15.9).astype(np.uint8)).resize((96, 96), Image.Resampling.BOX)
            for index in chosen
        ]
    return [Image.fromarray(picture) for picture in datasets.load_sample_images().images]


def figure_below(heading: str, name: str) -> gr.Image:
    """A figure under a heading; a label of its own would lie on top of it."""
    gr.Markdown(f"### {heading}")
    return gr.Image(
        label=heading, show_label=False, elem_id=name, interactive=False, buttons=["fullscreen"], format="png",
        container=False, alt_text=heading,
    )  # fmt: skip


def build(network: Network) -> gr.Blocks:
    """The page; it opens with the first picture to pick, where there is one."""
    pictures = examples(network.config["input_size"][0])
    with gr.Blocks(title="Gated attention coding", analytics_enabled=False) as page:
        gr.Markdown("# A spiking network, step by step\n" + describe(network))
        upload = gr.UploadButton("Upload a picture", elem_id="upload", variant="primary")
        gr.Markdown("or pick one:")
        gallery = gr.Gallery(
            [np.asarray(picture) for picture in pictures],
            label="pictures", show_label=False, columns=5, height="auto", allow_preview=False, object_fit="contain",
            interactive=False, buttons=[], elem_id="examples",
        )  # fmt: skip
        summary = gr.Markdown("Pick or upload a picture.", elem_id="summary")
        outputs = [summary, *(figure_below(heading, name) for name, heading in HEADINGS.items())]
        gr.Markdown(ENERGY_NOTE)

        def show(picture: Image.Image) -> list[object]:
            analysis = network.analyse(picture)
            return [
                figures.summary(analysis, network),
                figures.classes(analysis, network.labels),
                figures.gate(analysis),
                figures.raster(analysis),
                figures.energy(analysis),
            ]

        def uploaded(file: str) -> list[object]:
            try:
                return show(open_picture(Path(file)))
            except ValueError as error:  # not gr.Error, which would cover the figures that are there
                gr.Warning(str(error), title="Not shown")
                return [f"**{error}**", *[gr.skip()] * len(HEADINGS)]

        def picked(event: gr.SelectData) -> list[object]:
            return show(pictures[event.index])

        if pictures:
            page.load(lambda: show(pictures[0]), None, outputs, api_name=False)
        upload.upload(uploaded, upload, outputs, api_name="analyse")
        gallery.select(picked, None, outputs, api_name=False)
    return page


def main() -> int:
    """Serve the page; 2 where there is no model to serve."""
    parser = argparse.ArgumentParser(description="The demonstration Space, on this machine.")
    parser.add_argument("--model", default=os.environ.get("GAC_MODEL"), help="model folder, or ORG/NAME on the Hub")
    parser.add_argument("--host", default="0.0.0.0" if os.environ.get("SPACE_ID") else "127.0.0.1")
    parser.add_argument("--port", type=int, default=7860)
    options = parser.parse_args()
    try:
        network = Network(open_source(choose_model(options.model)))
    except ValueError as error:
        sys.stderr.write(f"app.py: {error}\n")
        return 2
    build(network).launch(
        server_name=options.host, server_port=options.port, css=CSS, max_file_size="25mb", share=False, ssr_mode=False
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
