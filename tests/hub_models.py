"""As much of the Hub's interface as pushing a model needs, on this machine: repositories that are
made, large files that are stored by their hash, and commits."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest
import yaml
from hub_data import StubHandler, served

TOKEN = "hf_secret"
LARGE = (".safetensors", ".gguf")
OID = "89abcdef0123456789abcdef0123456789abcdef"


@dataclass
class Repository:
    """private: as it was made. files: what the last commit holds, by name."""

    private: bool
    files: dict[str, bytes] = field(default_factory=dict)


@dataclass
class HubState:
    """repositories: by id. stored: large files by sha256. puts: hashes of those that were sent.
    refused_sizes: of large files that do not get through, as if the line broke. heads: of the
    cards that were checked."""

    repositories: dict[str, Repository] = field(default_factory=dict)
    stored: dict[str, bytes] = field(default_factory=dict)
    puts: list[str] = field(default_factory=list)
    refused_sizes: set[int] = field(default_factory=set)
    heads: list[dict[str, object]] = field(default_factory=list)
    endpoint: str = ""


class ModelHub(StubHandler):
    """state: what is there."""

    state: HubState

    def _answer_json(self, content: object, status: int = 200) -> None:
        self._answer(status, json.dumps(content).encode(), Content_Type="application/json")

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _is_known(self) -> bool:
        if self.headers.get("Authorization") == f"Bearer {TOKEN}":
            return True
        self._answer_json({"error": "Invalid username or password."}, 401)
        return False

    def do_GET(self) -> None:
        name = self.path.partition("?")[0].removeprefix("/api/models/")
        if (repository := self.state.repositories.get(name)) is None:
            return self._answer(404, X_Error_Code="RepoNotFound")
        siblings = [{"rfilename": file} for file in repository.files]
        about = {"id": name, "sha": OID, "private": repository.private, "siblings": siblings}
        return self._answer_json({"_id": "1", "tags": [], "downloads": 0, **about})

    def do_PUT(self) -> None:
        sha256, body = self.path.rpartition("/")[2], self._body()
        if len(body) in self.state.refused_sizes:
            return self._answer_json({"error": "the line broke"}, 400)
        assert hashlib.sha256(body).hexdigest() == sha256
        self.state.stored[sha256] = body
        self.state.puts.append(sha256)
        return self._answer(200)

    def do_POST(self) -> None:
        body = self._body()
        if not self._is_known():
            return None
        path = self.path.partition("?")[0]
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path == "/api/validate-yaml":
            head = json.loads(body)["content"].split("---")[1]
            self.state.heads.append(yaml.safe_load(head))
            return self._answer_json({"errors": [], "warnings": []})
        if path.endswith("/info/lfs/objects/batch"):
            return self._batch(json.loads(body)["objects"])
        name, _, what = path.removeprefix("/api/models/").rpartition("/main")[0].rpartition("/")
        if what == "preupload":
            return self._preupload(json.loads(body)["files"])
        assert what == "commit", path
        return self._commit(name, body)

    def _create(self, asked: dict[str, object]) -> None:
        name = f"{asked['organization']}/{asked['name']}"
        is_private = asked.get("visibility") == "private" or asked.get("private") is True
        address = {"url": f"{self.state.endpoint}/{name}", "id": "1", "name": name}
        if name in self.state.repositories:
            return self._answer_json({**address, "error": "You already created it"}, 409)
        self.state.repositories[name] = Repository(is_private)
        return self._answer_json(address)

    def _preupload(self, files: list[dict[str, str]]) -> None:
        modes = [
            {
                "path": each["path"],
                "uploadMode": "lfs" if each["path"].endswith(LARGE) else "regular",
                "shouldIgnore": False,
            }
            for each in files
        ]
        self._answer_json({"files": modes})

    def _batch(self, objects: list[dict[str, object]]) -> None:
        """Only what is not there has to be sent."""
        for each in objects:
            if each["oid"] not in self.state.stored:
                href = f"{self.state.endpoint}/put/{each['oid']}"
                each["actions"] = {"upload": {"href": href, "header": {}}}
        self._answer_json({"transfer": "basic", "objects": objects})

    def _commit(self, name: str, body: bytes) -> None:
        files = self.state.repositories[name].files
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.state.stored[value["oid"]]
        url = f"{self.state.endpoint}/{name}/commit/{OID}"
        self._answer_json({"commitUrl": url, "commitOid": OID, "pullRequestUrl": None})


@contextmanager
def hub_of_this_process() -> Iterator[HubState]:
    """`model_hub`, for huggingface_hub as it is imported here, and with a token for it."""
    from huggingface_hub import constants

    with model_hub() as state, pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "ENDPOINT", state.endpoint)
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        patch.setenv("HF_TOKEN", TOKEN)
        yield state


@contextmanager
def model_hub() -> Iterator[HubState]:
    """A Hub without a repository. Its address is `endpoint`, for HF_ENDPOINT."""
    state = HubState()
    with served(type("Handler", (ModelHub,), {"state": state})) as state.endpoint:
        yield state
