"""Model repositories on the Hugging Face Hub: which files may be taken, taking them, and errors in one sentence."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from huggingface_hub import HfApi, constants, get_session, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from .config import CONFIG, MAX_CONFIG_BYTES, read_config, short
from .folder import WEIGHTS

GOLDEN = "golden.safetensors"
CARD = "README.md"
# The files of a model repository that are downloaded; no others.
DOWNLOADED = (CONFIG, WEIGHTS, GOLDEN, CARD)
# The largest network here has 22 million parameters, 176 MB in float64.
MAX_BYTES = {CONFIG: MAX_CONFIG_BYTES, WEIGHTS: 1 << 32, GOLDEN: 1 << 28, CARD: 1 << 22}
TIMEOUT = 30.0
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".tar", ".joblib", ".npy", ".npz", ".h5", ".keras")
_FORBIDDEN = re.compile(r"[\x00-\x1f\x7f\\:]")
# HTTPError and what else the client's HTTP library raises: which one that is differs between its versions.
# What reading an answer that is no JSON, or other JSON than the Hub's, raises.
_UNREADABLE = (ValueError, TypeError, LookupError, AttributeError, AssertionError)
_TRANSPORT_LIBRARIES = ("httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3")


def check_names(names: Sequence[str], source: str) -> None:
    """Refuse a repository whose file names could lead out of the folder that they are written to.

    Raises:
        ValueError: A name is empty, absolute, has ``..``, a backslash, a colon or a control character.
    """
    for name in names:
        parts = PurePosixPath(name).parts
        if not parts or name.startswith(("/", "~")) or ".." in parts or _FORBIDDEN.search(name):
            raise ValueError(
                f"expected plain relative file names in {source}, got {short(name)}, which may lead out of its folder: "
                "do not use this repository"
            )


def check_files(names: Sequence[str], source: str) -> None:
    """Refuse a repository or folder without config.json or safetensors weights.

    Raises:
        ValueError: A name is no plain one, or one of the two files is missing.
    """
    check_names(names, source)
    if WEIGHTS not in names:
        pickles = sorted(name for name in names if name.endswith(PICKLES))
        reason = (
            f"got only {', '.join(pickles[:3])}, which may run code when read: ask its owner for safetensors"
            if pickles
            else "got none: check the name"
        )
        raise ValueError(f"expected {WEIGHTS} in {source}, {reason}")
    if CONFIG not in names:
        raise ValueError(f"expected {CONFIG} in {source}, got none: it is no timm model")


def split_revision(repo_id: str, revision: str | None) -> tuple[str, str | None]:
    """``ORG/NAME@REVISION`` in its two parts.

    Raises:
        ValueError: The revision is given twice.
    """
    name, _, tail = repo_id.partition("@")
    if tail and revision and tail != revision:
        raise ValueError(f"expected one revision, got {tail!r} and {revision!r}: leave one of them out")
    return name, revision or tail or None


def fetch_model(
    repo_id: str,
    revision: str | None = None,
    api: HfApi | None = None,
    cache_dir: Path | None = None,
) -> Path:
    """Download a model repository of the Hub, or find it in the cache where offline mode is on (HF_HUB_OFFLINE=1).

    The list of files is checked before the first of them is downloaded, and only config.json, safetensors and the card
    are; all of them of one commit.

    Args:
        repo_id: ``ORG/NAME`` or ``ORG/NAME@REVISION``.
        revision: Branch, tag or commit; ``main`` if not given.
        api: Client to use; one with the stored token if not given.
        cache_dir: Cache to use; the Hub's own if not given.

    Returns:
        The folder in the cache.

    Raises:
        ValueError: There is no such repository or revision, it holds no safetensors weights, a file name leads out of
            the folder, a file is too large, or the Hub cannot be reached.
    """
    api = api or HfApi(library_name="timm_gac")
    name, revision = split_revision(repo_id, revision)
    source = name if revision is None else f"{name}@{revision}"
    with hub_errors(source):
        if constants.HF_HUB_OFFLINE:
            folder = snapshot_download(
                name, revision=revision, cache_dir=cache_dir, allow_patterns=list(DOWNLOADED), local_files_only=True
            )
        else:
            info = api.model_info(name, revision=revision, files_metadata=True, timeout=TIMEOUT)
            siblings = info.siblings or []
            check_files([sibling.rfilename for sibling in siblings], source)
            for sibling in siblings:
                limit = MAX_BYTES.get(sibling.rfilename)
                if limit is not None and int(sibling.size or 0) > limit:
                    raise ValueError(
                        f"expected {sibling.rfilename} in {source} of at most {limit:,} bytes, got {sibling.size:,}: "
                        "it is not what its name says"
                    )
            folder = snapshot_download(
                name,
                revision=revision,  # by its name, under which the cache then knows it offline
                cache_dir=cache_dir,
                allow_patterns=list(DOWNLOADED),
                endpoint=api.endpoint,
                token=api.token,
                library_name="timm_gac",
            )
            if Path(folder).name != info.sha:
                raise ValueError(f"expected {source} unchanged meanwhile, got a new commit: try again")
    check_files([file.name for file in Path(folder).iterdir()], source)
    read_config(Path(folder))
    return Path(folder)


def open_source(source: str, revision: str | None = None, api: HfApi | None = None) -> Path:
    """The folder of a model given as a folder, or as a repository of the Hub, which is downloaded.

    Args:
        source: A model folder, a run folder with ``model/`` in it, or ``ORG/NAME[@REVISION]``, with or without timm's
            prefixes ``local-dir:`` and ``hf-hub:``.
        revision: Revision of a repository.
        api: Client to use.

    Raises:
        ValueError: It is neither; or see `fetch_model`.
    """
    if source.startswith("hf-hub:"):
        return fetch_model(source.removeprefix("hf-hub:"), revision, api)
    name = source.removeprefix("local-dir:")
    path = Path(name)
    if name and (exists(path) or source.startswith("local-dir:")):  # Path("") is the current folder
        if revision is not None:
            raise ValueError(f"expected a repository of the Hub with a revision, got the folder {str(path)!r}")
        return model_folder(path)
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*(@.+)?", source):  # and not ./NAME or ../NAME
        try:
            return fetch_model(source, revision, api)
        except ValueError as error:
            if error.__cause__ is None:  # the repository is there, but no model
                raise
            raise ValueError(
                f"expected a model or run folder, ORG/NAME on the Hub or a name of `timm-gac models`, got {source!r}: "
                f"no such folder exists here; of the Hub: {error}"
            ) from error
    raise ValueError(
        f"expected a model folder, ORG/NAME on the Hub or a name of `timm-gac models`, got {short(source)}, which is "
        "none, and no such folder exists: check the name, and the folder that the command runs in"
    )


def exists(path: Path) -> bool:
    """Whether a path is there; not where the system takes no such name."""
    try:
        return path.exists()
    except OSError:  # such as a name that is too long
        return False


def model_folder(path: Path) -> Path:
    """The model folder at a path, or the one in ``model/`` below it, as runs of the trainer keep it.

    Raises:
        ValueError: There is neither.
    """
    if not exists(path):
        raise ValueError(
            f"expected a model or run folder, got {str(path)!r}, which does not exist: check the path, and the folder "
            "that the command runs in"
        )
    if not path.is_dir():
        remedy = f"give its folder {str(path.parent)!r}" if path.name in (CONFIG, WEIGHTS) else "name a folder"
        raise ValueError(f"expected a model or run folder, got the file {str(path)!r}: {remedy}")
    folder = path / "model" if (path / "model" / CONFIG).is_file() else path
    names = [file.name for file in folder.iterdir()]
    if WEIGHTS not in names and (path / "checkpoints").is_dir():
        raise ValueError(
            f"expected a model folder, or a run folder with model/ in it, got the run folder {str(path)!r} without: "
            "the run has not ended, go on with --resume"
        )
    missing = [name for name in (CONFIG, WEIGHTS) if name not in names]
    weights = [name for name in names if name.endswith(PICKLES) and not name.endswith((".npy", ".npz"))]
    if missing and not weights:  # arrays of NumPy beside a command are data
        raise ValueError(
            f"expected a model folder with {CONFIG} and {WEIGHTS}, or a run folder with model/ in it, got "
            f"{str(path)!r} without {' and '.join(missing)}: check the path"
        )
    check_files(names, repr(str(folder)))
    return folder


@contextmanager
def hub_errors(source: str) -> Iterator[None]:
    """Turn what the Hub's client raises into a ValueError of one sentence that says what to do.

    A request within ``with`` may wait for `TIMEOUT` seconds without a byte; the client's own default is for ever.
    """
    session = get_session()
    before = session.timeout
    session.timeout = TIMEOUT
    try:
        yield
    except HFValidationError as error:
        raise ValueError(f"expected a repository as ORG/NAME, got {source!r}: {_first_line(error)}") from error
    except Exception as error:
        sentence = explain(error, source)
        if sentence is None:
            raise
        raise ValueError(sentence) from error
    finally:
        session.timeout = before


def explain(error: BaseException, source: str) -> str | None:
    """One sentence for an error of the Hub's client or of the network under it; None for any other error."""
    if isinstance(error, OfflineModeIsEnabled):
        return f"expected a connection to the Hub for {source}, got HF_HUB_OFFLINE=1: unset it"
    if isinstance(error, LocalTokenNotFoundError):
        return f"expected a token for {source}, got none: set HF_TOKEN or run `hf auth login`"
    if isinstance(error, LocalEntryNotFoundError):
        return f"expected {source} in the cache or a connection to the Hub, got neither: go online and try again"
    if isinstance(error, RevisionNotFoundError):
        return f"expected an existing revision, got {source}, which has none of that name: check its branches and tags"
    if isinstance(error, GatedRepoError):
        return f"expected access to {source}, got a gated repository: ask its owner on its page, then try again"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, RepositoryNotFoundError):  # the Hub answers 401 where nobody is logged in
        return f"expected an existing repository, got {source}, which is none or private: check the name and HF_TOKEN"
    if isinstance(error, HfHubHTTPError) and status is not None:
        return _explain_status(status, error, source)
    library = type(error).__module__.partition(".")[0]
    if library in _TRANSPORT_LIBRARIES or isinstance(error, ConnectionError | TimeoutError):
        return f"expected a connection to the Hub for {source}, got {type(error).__name__}: check it and try again"
    cause = error.__cause__
    if isinstance(error, RuntimeError) and cause is not None:  # so the client wraps what fails in an upload thread
        return explain(cause, source)
    if isinstance(error, OSError) and error.errno is not None:
        return f"expected to store {source}, got {type(error).__name__} ({error.strerror}): free space or set HF_HOME"
    if isinstance(error, _UNREADABLE) and not str(error).startswith("expected "):
        return (
            f"expected the Hub's answer about {source}, got one that cannot be read ({type(error).__name__}), such as "
            "the login page of a network: check the connection and HF_ENDPOINT"
        )
    return None


def _explain_status(status: int, error: HfHubHTTPError, source: str) -> str:
    if status == 401:
        return f"expected a valid token for {source}, got one that the Hub does not accept, or none: set HF_TOKEN anew"
    if status == 403:
        return (
            f"expected the right to write to {source}, got a refusal: use a token with write access, of a member of "
            "its organisation"
        )
    if status in (409, 412):
        return f"expected {source} unchanged meanwhile, got a change by somebody else: try again"
    if status == 429:
        return f"expected fewer requests, got the Hub's limit for {source}: wait a few minutes and try again"
    if status >= 500:
        return f"expected an answer from the Hub for {source}, got its error {status}: try again later"
    return f"expected the Hub to accept {source}, got its refusal {status} ({_first_line(error)}): correct this"


def _first_line(error: Exception) -> str:
    message = getattr(error, "server_message", None) or str(error)
    return " ".join(message.split())[:200]
