"""Publishing a model repository: all files in one commit; no pickles; files are replaced only on request."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import EntryNotFoundError
from huggingface_hub.hf_api import RepoFile

from .golden import sha256
from .prepare import PublishConfig, prepare_folder
from .remote import PICKLES, TIMEOUT, check_names, hub_errors


@dataclass(frozen=True)
class PushResult:
    """What `push` did.

    Attributes:
        files: The repository's files and their sizes in bytes.
        folder: Folder that holds them; None where it was a temporary one.
        url: Address of the commit; None in a dry run.
        sent: Files that were new or different on the Hub.
    """

    files: dict[str, int]
    folder: Path | None
    url: str | None = None
    sent: tuple[str, ...] = ()


def push(source: Path, config: PublishConfig, api: HfApi | None = None) -> PushResult:
    """Publish a run or a model folder on the Hugging Face Hub.

    Large files are sent first; then one commit makes all files visible at once. So an upload that is cut off leaves
    the repository as it was, and the next try sends only what is still missing.

    Args:
        source: Run folder of the trainer, or a model folder.
        config: What to publish, and where.
        api: Client to use; one with the stored token (HF_TOKEN or ``hf auth login``) if not given.

    Returns:
        The files, where they are, and the address of the commit.

    Raises:
        ValueError: The source or ``out`` does not fit (see `prepare_folder`); the repository has other files of these
            names and ``overwrite`` is not set; the token is missing, invalid or without the right to write; or the
            connection failed.
    """
    out = config.out
    if out is None and config.dry_run:
        out = Path("push", config.repo_id.rpartition("/")[2])
    if out is not None:
        return _publish(prepare_folder(source, out, config), config, api, out)
    with tempfile.TemporaryDirectory(prefix="timm-gac-") as scratch:
        return _publish(prepare_folder(source, Path(scratch, "repository"), config), config, api, None)


def _publish(files: list[Path], config: PublishConfig, api: HfApi | None, folder: Path | None) -> PushResult:
    result = PushResult({file.name: file.stat().st_size for file in files}, folder)
    check_upload([file.name for file in files])
    if config.dry_run:
        return result
    api = api or HfApi(library_name="timm_gac")
    with hub_errors(config.repo_id):
        api.whoami()  # a bad token is told apart here from a missing right below
        if not api.repo_exists(config.repo_id):  # a token for this one repository may not create any
            api.create_repo(config.repo_id, private=config.private or None, exist_ok=True)
        head = api.model_info(config.repo_id, timeout=TIMEOUT).sha
        changed = changed_files(api, config.repo_id, files)
        if changed and not config.overwrite:
            occupied = [file.name for file, exists in changed if exists]
            if occupied:
                raise ValueError(
                    f"expected a repository without {', '.join(occupied)}, got {config.repo_id} with other ones: "
                    "choose another --repo-id, or --overwrite"
                )
        if not changed:
            return PushResult(result.files, folder, f"{api.endpoint}/{config.repo_id}")
        commit = api.create_commit(
            config.repo_id,
            [CommitOperationAdd(file.name, str(file)) for file, _ in changed],
            commit_message="Publish with timm-gac",
            parent_commit=head,
        )
    return PushResult(result.files, folder, str(commit.commit_url), tuple(file.name for file, _ in changed))


def check_upload(names: Iterable[str]) -> None:
    """Refuse to send a pickle, or a name that leads out of a folder.

    Raises:
        ValueError: A file is a pickle by its suffix, or a name leads out of a folder.
    """
    names = list(names)
    check_names(names, "the folder")
    for name in names:
        if name.endswith(PICKLES):
            raise ValueError(f"expected safetensors only, got {name!r}: pickles are not published")


def changed_files(api: HfApi, repo_id: str, files: list[Path]) -> list[tuple[Path, bool]]:
    """Files that the repository lacks or has with other content, each with whether the name exists there."""
    there: dict[str, RepoFile] = {}
    with suppress(EntryNotFoundError):  # a repository without any commit has no tree
        there = {item.path: item for item in api.list_repo_tree(repo_id) if isinstance(item, RepoFile)}
    return [(file, file.name in there) for file in files if not _same(file, there.get(file.name))]


def _same(file: Path, remote: RepoFile | None) -> bool:
    """Whether the Hub's file has the content of this one, by the checksum that the Hub keeps of it."""
    if remote is None or remote.size != file.stat().st_size:
        return False
    if remote.lfs is not None:
        return remote.lfs.sha256 == sha256(file)
    content = file.read_bytes()
    return remote.blob_id == hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
