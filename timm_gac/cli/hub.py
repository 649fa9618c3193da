"""``timm-gac convert``, ``push`` and ``verify``: model folders and the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro

from ..runtime.terminal import plain
from .output import check_writable, create_console


def convert(
    file: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FILE")],
    out_folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT_FOLDER")],
    model: str | None = None,
    num_classes: int | None = None,
    num_steps: int | None = None,
    overwrite: bool = False,
) -> int:
    """Turn a checkpoint of the published code into a model folder.

    Example: timm-gac convert checkpoint.pth converted

    Args:
        file: The checkpoint (.pth); read without running any code that it may hold.
        out_folder: Folder to write.
        model: Name of the model; found out from the file where left out.
        num_classes: Number of classes; found out from the file where left out.
        num_steps: Number of time steps T; found out from the file where left out, 4 for direct coding.
        overwrite: Replace the model in a folder that has one.
    """
    from ..hub import convert_checkpoint

    check_writable(out_folder, "OUT_FOLDER")
    folder = convert_checkpoint(
        file, out_folder, model=model, num_classes=num_classes, num_steps=num_steps, overwrite=overwrite
    )
    load = f"timm.create_model('local-dir:{folder}', pretrained=True)"
    create_console().print(plain(f"wrote {folder}: load it with {load}"), markup=False)
    return 0


def push(
    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_OR_FOLDER")],
    repo_id: str,
    private: bool = False,
    dry_run: bool = False,
    out: Path | None = None,
    overwrite: bool = False,
    label_names: str | None = None,
    dataset: str | None = None,
    license: str | None = None,
) -> int:
    """Publish a run or a model folder on the Hugging Face Hub.

    The token is that of `hf auth login` or HF_TOKEN. --dry-run shows what would be sent.

    Example: timm-gac push runs/gac --repo-id ORG/NAME --dry-run

    Args:
        source: Run folder of the trainer, or a folder with config.json and model.safetensors.
        repo_id: Repository on the Hub, ORG/NAME.
        private: Make a new repository private.
        dry_run: Write the folder and show its files; nothing is sent.
        out: Folder to keep what is published in; push/NAME in a dry run where left out.
        overwrite: Replace files that are there already, on the Hub and in the folder.
        label_names: Names of the classes: cifar10, cifar100, or a text file with the name of one class a line, in
            order. Where left out: those of the run, or of the data set it names, if known.
        dataset: Name of the training data, such as cifar100, where the run does not say it.
        license: Licence of the weights, as the Hub spells it; that of the model's config, else apache-2.0, where left
            out.
    """
    from ..hub import PublishConfig
    from ..hub import push as publish
    from ..hub.config import is_ann, read_config
    from ..hub.remote import model_folder

    config = PublishConfig(
        repo_id=repo_id,
        private=private,
        dry_run=dry_run,
        out=out,
        overwrite=overwrite,
        label_names=label_names,
        dataset=dataset,
        license=license,
    )
    result = publish(source, config)

    def show(text: str) -> None:
        console.print("\n".join(map(plain, text.splitlines())), markup=False)

    console = create_console()
    for name, size in result.files.items():
        mark = "sent" if name in result.sent else "    " if dry_run else "same"
        show(f"{mark}  {size:>12,}  {name}")
    if "energy.json" not in result.files and not is_ann(read_config(model_folder(source))["architecture"]):
        show(f"the card has no energy: `timm-gac energy {source} --data DATA --out {source}` measures it")
    if dry_run:
        show(f"nothing was sent: look at {result.folder}, then push without --dry-run")
    else:
        show(f"published: {result.url}\nload it with timm.create_model('hf-hub:{repo_id}')")
    return 0


def verify(
    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="REPO_OR_FOLDER")], revision: str | None = None
) -> int:
    """Compare a model's logits with the golden ones kept with it.

    The model of the Hub or of a folder is rebuilt for that. Status 1 where they differ.

    Example: timm-gac verify ORG/NAME

    Args:
        source: ORG/NAME on the Hub, or a folder.
        revision: Branch, tag or commit of the repository.
    """
    from ..hub import open_source
    from ..hub import verify as check

    result = check(open_source(source, revision))
    create_console().print(
        f"weights         {'those' if result.same_weights else 'NOT those'} that the golden output was made with\n"
        f"float64 logits  largest difference {result.difference:.1e} over {result.images} images\n"
        f"float32 classes {'equal' if result.same_classes else 'different'}\n"
        f"{'verified' if result.passed else 'FAILED'}: {plain(source)}",
        markup=False,
    )
    return 0 if result.passed else 1
