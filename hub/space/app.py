"""The demonstration Space: a spiking network on a picture, time step by time step.

``python app.py`` serves --model or GAC_MODEL, else the published weights, else the digit network of ``make demo``.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping
from pathlib import Path

import figures
import gradio as gr
import numpy as np
from analysis import Network, open_picture
from pictures import examples
from PIL import Image
from torch import Tensor

from timm_gac.hub import open_source
from timm_gac.hub.card import OTHER_LICENSE
from timm_gac.hub.dataset import DIGITS

HERE = Path(__file__).resolve().parent
MODELS = HERE.parent / "models"  # beside the Space in a clone
PUBLISHED = ("gac_msresnet18_cifar.cifar100", "msresnet18_cifar.cifar100")  # the first is shown first
ORGANISATION = "timm-gac"
DEMO = HERE.parents[1] / "demo"
# The gallery gives each column 100 pixels at least, wider than a phone, and keeps an empty third row.
CSS = """
.gradio-container {width: 100% !important; max-width: 760px !important; margin: auto}
#examples .grid-container {grid-template-columns: repeat(var(--grid-cols), minmax(0, 1fr)) !important}
#examples .grid-wrap {min-height: 0 !important; height: auto !important; max-height: none !important}
footer {display: none !important}
"""
HEADINGS = {
    "classes": "Likeliest classes",
    "gate": "Gate of the encoder, mean over channels",
    "raster": "Spikes, and firing rate of each layer",
    "energy": "Energy, estimated",
}
KEEP_SECONDS = 1800  # of a visitor's prepared picture, and of uploaded and drawn files
ENERGY_NOTE = (
    "Estimated from counted operations at 45 nm (4.6 pJ a multiply-accumulate, 0.9 pJ an accumulate; memory traffic, "
    "norms and neurons left out), not measured on a chip. *Strict* counts a multiply-accumulate wherever a layer's input "
    "is real-valued; *as the paper counts* takes shortcuts as accumulates and leaves the encoder's attention out. The ANN "
    "runs each layer once, without the gate."
)


def choose_models(model: str | None) -> list[str]:
    """The models to serve: the one asked for, else the published ones, else the demonstration's.

    Published weights are in hub/models of a clone; a Space, which has no such folder, takes them from the Hub.

    Raises:
        ValueError: There is none.
    """
    if model:
        return [model]
    found = [folder for folder in sorted(MODELS.glob("*")) if (folder / "model.safetensors").is_file()]
    if found:
        first = {name: place for place, name in enumerate(PUBLISHED)}
        return [str(folder) for folder in sorted(found, key=lambda folder: first.get(folder.name, len(first)))]
    if os.environ.get("SPACE_ID"):
        return [f"{ORGANISATION}/{name}" for name in PUBLISHED]
    if (DEMO / "model.safetensors").is_file():
        return [str(DEMO)]
    raise ValueError("expected a model, got none: run `make demo` first, or give --model FOLDER or ORG/NAME")


def open_networks(sources: list[str]) -> dict[str, Network]:
    """The networks by the name that the page gives them.

    Raises:
        ValueError: A source is no model; see `open_source`.
    """
    networks: dict[str, Network] = {}
    for source in sources:
        network = Network(open_source(source))
        title = "gated attention coding" if network.facts.gated else "direct coding"
        networks[title if title not in networks else Path(source).name] = network
    return networks


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
    if facts.license.get("license") == "other":
        link = facts.license.get("license_link", OTHER_LICENSE["license_link"])
        text += f" Its weights come under [terms of their own]({link})."
    if facts.dataset == DIGITS:
        text += " **A stand-in:** it knows the ten digits only, until the CIFAR-100 weights are published."
    return text


def figure_below(heading: str, name: str) -> tuple[gr.Column, gr.Image]:
    """A figure under a heading; a label of its own would lie on top of it."""
    with gr.Column() as column:
        gr.Markdown(f"### {heading}")
        figure = gr.Image(
            label=heading, show_label=False, elem_id=name, interactive=False, buttons=[], format="png",
            container=False, alt_text=heading,
        )
    return column, figure


def build(networks: Mapping[str, Network]) -> gr.Blocks:
    """The page; it opens with the first picture to pick, where there is one."""
    titles = list(networks)
    pictures = examples(networks[titles[0]].config["input_size"][0])
    # A session keeps a picture as the networks see it, some kilobytes, and not the picture itself.
    Prepared = dict[str, Tensor]

    def prepare(picture: Image.Image) -> Prepared:
        return {title: network.prepare(picture) for title, network in networks.items()}

    with gr.Blocks(
        title="Gated attention coding", analytics_enabled=False, delete_cache=(KEEP_SECONDS, KEEP_SECONDS)
    ) as page:
        gr.Markdown("# A spiking network, step by step")
        about = gr.Markdown(describe(networks[titles[0]]), elem_id="about")
        current = gr.State(prepare(pictures[0]) if pictures else None, time_to_live=KEEP_SECONDS)
        choice = gr.Radio(
            titles, value=titles[0], label="Network", visible=len(titles) > 1, elem_id="network"
        )
        upload = gr.UploadButton("Upload a picture", elem_id="upload", variant="primary")
        if pictures:
            gr.Markdown("or pick one:")
        gallery = gr.Gallery(
            [np.asarray(picture) for picture in pictures],
            label="pictures", show_label=False, columns=columns(pictures), height="auto", allow_preview=False,
            object_fit="contain", interactive=False, buttons=[], elem_id="examples", visible=bool(pictures),
        )
        summary = gr.Markdown("Pick or upload a picture.", elem_id="summary")
        figures_below = {name: figure_below(heading, name) for name, heading in HEADINGS.items()}
        gate_column = figures_below["gate"][0]
        outputs = [current, about, summary, gate_column, *(figure for _, figure in figures_below.values())]
        gr.Markdown(ENERGY_NOTE)

        def show(prepared: Prepared | None, title: str) -> list[object]:
            network = networks[title]
            if prepared is None:
                return [None, describe(network), *[gr.skip()] * (len(outputs) - 2)]
            analysis = network.analyse(prepared[title])
            return [
                prepared,
                describe(network),
                figures.summary(analysis, network),
                gr.update(visible=analysis.gate is not None),
                figures.classes(analysis, network.labels),
                figures.gate(analysis),
                figures.raster(analysis),
                figures.energy(analysis),
            ]

        def uploaded(file: str, title: str) -> list[object]:
            try:
                return show(prepare(open_picture(Path(file))), title)
            except ValueError as error:  # not gr.Error, which would cover the figures that are there
                gr.Warning(str(error), title="Not shown")
                return [gr.skip(), gr.skip(), f"**{error}**", *[gr.skip()] * (len(outputs) - 3)]
            finally:
                Path(file).unlink(missing_ok=True)  # of a visitor, and no longer needed

        def picked(title: str, event: gr.SelectData) -> list[object]:
            return show(prepare(pictures[event.index]), title)

        one = {"concurrency_limit": 1, "concurrency_id": "analysis"}  # decodes and analyses one picture at a time
        page.load(show, [current, choice], outputs, api_name=False, **one)
        upload.upload(uploaded, [upload, choice], outputs, api_name="analyse", **one)
        gallery.select(picked, choice, outputs, api_name=False, **one)
        choice.change(show, [current, choice], outputs, api_name=False, **one)
    return page


def columns(pictures: list[Image.Image]) -> int:
    """Columns of the pictures to pick, so that their rows are full."""
    return 5 if len(pictures) % 5 == 0 else 4


def main() -> int:
    """Serve the page; 2 where there is no model to serve."""
    parser = argparse.ArgumentParser(description="The demonstration Space, on this machine.")
    parser.add_argument("--model", default=os.environ.get("GAC_MODEL"), help="model folder, or ORG/NAME on the Hub")
    parser.add_argument("--host", default="0.0.0.0" if os.environ.get("SPACE_ID") else "127.0.0.1")
    parser.add_argument("--port", type=int, default=7860)
    options = parser.parse_args()
    try:
        networks = open_networks(choose_models(options.model))
    except ValueError as error:
        sys.stderr.write(f"app.py: {error}\n")
        return 2
    build(networks).launch(
        server_name=options.host, server_port=options.port, css=CSS, theme=theme(), max_file_size="25mb", share=False,
        ssr_mode=False,
    )
    return 0


def theme() -> gr.Theme:
    """Letters of the visitor's own system: nothing is fetched from another host."""
    system = ["system-ui", "Roboto", "Helvetica", "sans-serif"]
    return gr.themes.Default(font=system, font_mono=["ui-monospace", "monospace"])


if __name__ == "__main__":
    sys.exit(main())
