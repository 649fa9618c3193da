"""Measure the tables of energy.md anew and write them into it: ``python docs/tables.py --help``."""

from __future__ import annotations

import re
from pathlib import Path

import timm
import tyro

from timm_gac.cli.sources import open_images
from timm_gac.energy import EnergyReport, measure_energy
from timm_gac.hub import open_network

PAGE = Path(__file__).with_name("energy.md")
# mJ per image as published (Qiu et al., AAAI 2024). With the stem's MACs, it gives the mean firing rate.
PUBLISHED = {
    ("gac_msresnet18", 4): 1.49,
    ("gac_msresnet18", 6): 2.34,
    ("gac_msresnet34", 4): 2.20,
    ("gac_msresnet34", 6): 3.38,
}
TRAINED = ("gac_msresnet18_cifar.cifar100", "msresnet18_cifar.cifar100")


def spiking_rate(report: EnergyReport, accumulates: float) -> float:
    """Mean firing rate, weighted by MACs, of all layers but the stem, from the accumulates under `paper`."""
    macs = sum(layer.macs for layer in report.layers if layer.kind not in ("attention", "stem"))
    return accumulates / (macs * report.num_steps)


def row(name: str, report: EnergyReport) -> list[str]:
    """Row of a table: energies under each convention and their ratio to the ANN's, and the mean firing rate."""
    totals = report.totals()
    cells = [
        f"{totals[key]['energy_mj']:.3g} ({totals[key]['of_ann']:.0%})" for key in ("paper", "strict", "neurobench")
    ]
    rate = spiking_rate(report, totals["paper"]["acs"])
    return [f"`{name}`", str(report.num_steps), *cells, f"{report.ann_mj:.3g}", f"{rate:.1%}"]


def table(headings: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [headings, ["---"] * len(headings), *rows])


def random_table(picture: str) -> str:
    """Table of the ImageNet networks with random weights, GAC and direct, with the published energies."""
    rows = []
    for (name, steps), published in PUBLISHED.items():
        for model in (name, name.removeprefix("gac_")):
            opened = open_network(model, steps)
            images = open_images(picture, opened.network, 1)
            opened.calibrate_untrained([images])
            report = measure_energy(opened.network, [images])
            cells = row(model, report)
            if model == name:
                stem = next(layer.macs for layer in report.layers if layer.kind == "stem")
                rate = spiking_rate(
                    report, (published - stem * report.costs.mac_pj * 1e-9) / (report.costs.ac_pj * 1e-9)
                )
                cells += [f"{published:.2f}", f"{rate:.1%}"]
            else:
                cells += ["", ""]
            rows.append(cells)
    headings = ["network", "T", "paper", "strict", "neurobench", "ANN", "rate", "published", "its rate"]
    return table(headings, rows)


def trained_table(data: str, images: int) -> str:
    """Table of the trained CIFAR-100 networks on part of the test set, with the ratio of GAC to direct coding."""
    missing = [name for name in TRAINED if not timm.get_pretrained_cfg(name).file]
    if missing:
        return f"Not measured yet: `{missing[0]}` is not in `hub/models`."
    reports = []
    for name in TRAINED:
        opened = open_network(name)
        batches = open_images(data, opened.network, images).split(50)
        reports.append(measure_energy(opened.network, batches, weights=opened.origin))
    rows = [row(name, report) for name, report in zip(TRAINED, reports, strict=True)]
    first, second = (report.totals() for report in reports)
    shares = [
        f"**{first[key]['energy_mj'] / second[key]['energy_mj']:.1%}**" for key in ("paper", "strict", "neurobench")
    ]
    rows.append(["GAC / direct", "", *shares, "", ""])
    text = table(["network", "T", "paper", "strict", "neurobench", "ANN", "rate"], rows)
    return f"{text}\n\n{reports[0].images:,} images of the test set, evenly spread over it."


def write(name: str, text: str) -> None:
    """Replace the text between a table's marks in energy.md."""
    page = PAGE.read_text(encoding="utf-8")
    pattern = rf"(<!-- {name}: [^>]*-->\n).*?(<!-- end -->)"
    page, count = re.subn(pattern, lambda found: f"{found[1]}{text}\n{found[2]}", page, count=1, flags=re.DOTALL)
    if not count:
        raise ValueError(f"expected the marks of table {name!r} in {PAGE}, got none: put them back")
    PAGE.write_text(page, encoding="utf-8")


def main(picture: str | None = None, cifar: str | None = None, images: int = 2000) -> None:
    """Measure the tables of docs/energy.md anew and write them into it.

    Args:
        picture: A picture for the ImageNet networks with random weights.
        cifar: CIFAR-100 as .npz or a timm data set, for the trained networks.
        images: Images of the CIFAR-100 test set.
    """
    if not (picture or cifar):
        raise SystemExit("expected --picture or --cifar, got neither: say what to measure")
    if picture:
        write("random", random_table(picture))
    if cifar:
        write("trained", trained_table(cifar, images))


if __name__ == "__main__":
    tyro.cli(main)
