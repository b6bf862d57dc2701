"""From a finished folder or file to a repository on the Hub.

Nothing goes there that was not checked: of a folder, what its manifest lists and was read again.
huggingface_hub uploads, and an upload that was interrupted goes on: what has arrived is not sent
again."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import llmq
from llmq.cards.head import CARD
from llmq.cards.names import for_repository, with_download
from llmq.errors import LlmqError
from llmq.messages import brief
from llmq.storage import files
from llmq.storage.manifest import check_folder, read_manifest

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_LOG_IN = "log in with 'hf auth login' or set HF_TOKEN, with a token that may write"
_REASONS = {
    401: "the Hub does not take the token",
    403: "the token may not write there",
    404: "there is no such user or organization, or the token may not write there",
}


@dataclass(frozen=True)
class Parcel:
    """What goes into a repository. paths: by the name there. contents: files that are others there
    than here, by name. left_behind: what lies beside and does not go."""

    paths: dict[str, Path]
    contents: dict[str, bytes]
    left_behind: tuple[str, ...] = ()


@dataclass(frozen=True)
class Pushed:
    """What is on the Hub. url: of the repository. private: whether only its owner sees it. files:
    names there. left_behind: what lies in the folder and was not pushed, because llmq did not write
    it."""

    repo_id: str
    url: str
    commit: str
    commit_url: str
    private: bool
    files: tuple[str, ...]
    left_behind: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def check_destination(repo_id: str) -> None:
    """Raise `LlmqError` for a name that no repository can have, and where there is no token or the
    Hub is not to be asked. The network is not used."""
    from huggingface_hub import constants, get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo_id)
        is_whole = repo_id.count("/") == 1
    except HFValidationError:
        is_whole = False
    if not is_whole:
        raise LlmqError(
            f"{repo_id}: no name of a repository; expected USER/NAME of letters, digits, '-', '_' "
            "and '.', such as me/qwen3-w4"
        )
    if constants.HF_HUB_OFFLINE:
        raise LlmqError(f"{repo_id}: HF_HUB_OFFLINE is set, so nothing can be pushed; unset it")
    if get_token() is None:
        raise LlmqError(f"{repo_id}: there is no token for the Hub; {_LOG_IN}")


def parcel_of_folder(folder: Path, repo_id: str) -> Parcel:
    """The files of a folder of llmq, each compared with the manifest, and its card with code that
    names the repository, unless somebody has edited it. Raises `LlmqError` without a manifest,
    `VerificationError` for a file that is another."""
    verdict = check_folder(folder)
    names = [*verdict.ok, *verdict.edited, files.MANIFEST]
    contents: dict[str, bytes] = {}
    if CARD in verdict.ok:
        card = (folder / CARD).read_text(encoding="utf-8")
        contents[CARD] = for_repository(card, repo_id).encode()
        entries = read_manifest(folder)
        entries[CARD] = files.digest_of(contents[CARD])
        contents[files.MANIFEST] = files.json_bytes(files.manifest_of(entries))
    paths = {name: folder / name for name in names if name not in contents}
    return Parcel(paths, contents, tuple(verdict.extra))


def parcel_of_file(path: Path, card_path: Path, repo_id: str) -> Parcel:
    """A file, and the card that lies beside it, if there is one."""
    contents = {}
    if card_path.is_file():
        card = card_path.read_text(encoding="utf-8")
        contents[CARD] = with_download(card, repo_id, path.name).encode()
    return Parcel({path.name: path}, contents)


def push_parcel(parcel: Parcel, repo_id: str, *, private: bool, again: str) -> Pushed:
    """Put files into a repository, which is made where there is none. private: for its owner alone.
    again: the command that goes on after a failure. Raises `LlmqError` with it."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError

    api = HfApi(library_name="llmq", library_version=llmq.__version__)
    try:
        url = api.create_repo(repo_id, private=private, exist_ok=True)
        is_private = _visibility(api, repo_id, private)
        with _staged(parcel) as folder:
            done = api.upload_folder(
                repo_id=repo_id, folder_path=folder, commit_message="Upload with llmq"
            )
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        raise LlmqError(_failure(error, repo_id, again)) from error
    names = sorted([*parcel.paths, *parcel.contents])
    return Pushed(
        repo_id,
        str(url),
        done.oid,
        done.commit_url,
        is_private,
        tuple(names),
        parcel.left_behind,
    )


def _visibility(api: HfApi, repo_id: str, private: bool) -> bool:
    """Whether the repository is private. Raises `LlmqError` for one that was public before, where
    nobody said that this may be."""
    is_private = bool(api.model_info(repo_id).private)
    if private and not is_private:
        raise LlmqError(
            f"{repo_id}: exists and is public; give --public (private=False) to put the files "
            "where everybody sees them, or another name"
        )
    return is_private


def _failure(error: Exception, repo_id: str, again: str) -> str:
    status = getattr(getattr(error, "response", None), "status_code", None)
    reason, remedy = _REASONS.get(status or 0), "check the network and HF_ENDPOINT"
    if reason:
        remedy = _LOG_IN
    elif isinstance(error, ValueError):  # about a file, such as the head of a card
        remedy = "mend what it names"
    return f"{repo_id}: not pushed ({reason or brief(error)}); {remedy}, then '{again}' goes on"


@contextmanager
def _staged(parcel: Parcel) -> Iterator[Path]:
    """A folder with links to the files, and with those that are others there."""
    with tempfile.TemporaryDirectory(prefix="llmq-push-") as name:
        folder = Path(name)
        for file_name, path in parcel.paths.items():
            (folder / file_name).parent.mkdir(parents=True, exist_ok=True)
            (folder / file_name).symlink_to(path.absolute())
        _write(folder, parcel.contents)
        yield folder


def _write(folder: Path, contents: Mapping[str, bytes]) -> None:
    for name, content in contents.items():
        (folder / name).write_bytes(content)
