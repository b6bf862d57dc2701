"""`llmq.push`: a result onto the Hub."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from llmq.arguments import check_type
from llmq.cards.upload import (
    Pushed,
    check_destination,
    parcel_of_file,
    parcel_of_folder,
    push_parcel,
)
from llmq.formats.exported import card_path
from llmq.formats.gguf.container import GgufFile

_FILE = ".gguf"


def push(folder: str | os.PathLike[str], repo_id: str, *, private: bool = True) -> Pushed:
    """Put a folder that llmq wrote, or a .gguf file, into a repository on the Hub, with its card as
    the page that people see.

        llmq.push("qwen3-w4", "me/qwen3-w4").commit_url

    private: for its owner alone; False for everybody. Every file is compared with the manifest of
    the folder first; what llmq did not write stays here. An upload that was interrupted goes on
    when it is called again. Raises `LlmqError` without a token (`hf auth login`, or HF_TOKEN), for
    a repository that is public already where `private` is asked for, and when the Hub cannot be
    reached, `VerificationError` for a file that is not as it was written."""
    check_type("folder", folder, (str, os.PathLike), "a folder that llmq wrote, or a .gguf file")
    check_type("repo_id", repo_id, str, "USER/NAME on the Hub")
    check_type("private", private, bool, "True or False")
    check_destination(repo_id)
    path = Path(folder)
    if path.suffix.lower() == _FILE and path.is_file():
        GgufFile(path)  # whole, as far as it says itself
        parcel = parcel_of_file(path, card_path(path), repo_id)
    else:
        parcel = parcel_of_folder(path, repo_id)
    again = again_with(folder, repo_id, private=private)
    return push_parcel(parcel, repo_id, private=private, again=again)


def again_with(folder: str | os.PathLike[str], repo_id: str, *, private: bool) -> str:
    """The command that pushes a folder, or goes on with it."""
    command = f"llmq push {shlex.quote(os.fspath(folder))} {repo_id}"
    return command if private else f"{command} --public"
