"""`llmq.push` and `--push-to` against a Hub on this machine: what is asked for before anything is
computed, what goes and what stays, and an upload that broke off."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from hub_models import TOKEN, Repository, hub_of_this_process, model_hub

import llmq
from llmq.commands.cli import main
from llmq.errors import LlmqError, VerificationError
from llmq.storage.files import MANIFEST
from llmq.storage.manifest import check_hashes

RTN = ["--method", "rtn"]


@pytest.fixture
def hub():
    """A Hub that huggingface_hub goes to, with a token for it."""
    with hub_of_this_process() as state:
        yield state


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    """A folder of two files of weights."""
    model = llmq.load("tiny")
    llmq.quantize(model, "w4g128", method="rtn")
    folder = tmp_path_factory.mktemp("result") / "tiny-w4"
    llmq.save(model, folder, max_shard_bytes=2_000_000)
    assert len(list(folder.glob("*.safetensors"))) == 2
    return folder


@pytest.fixture
def copy(result, tmp_path):
    """Its own for a test that changes it."""
    return shutil.copytree(result, tmp_path / "copy")


def test_a_folder_is_private_and_whole_with_its_card(hub, copy, tmp_path):
    (copy / "notes.txt").write_text("mine")
    pushed = llmq.push(copy, "me/tiny-w4")
    assert pushed.private
    assert hub.repositories["me/tiny-w4"].private
    assert pushed.commit_url == f"{hub.endpoint}/me/tiny-w4/commit/{pushed.commit}"
    assert pushed.url == f"{hub.endpoint}/me/tiny-w4"
    assert pushed.left_behind == ("notes.txt",)
    files = hub.repositories["me/tiny-w4"].files
    assert set(files) == set(pushed.files) == {path.name for path in copy.iterdir()} - {"notes.txt"}
    there = tmp_path / "there"
    there.mkdir()
    for name, content in files.items():
        (there / name).write_bytes(content)
        if name not in ("README.md", MANIFEST):
            assert content == (copy / name).read_bytes()
    verdict = check_hashes(there)  # the manifest goes with the card as it is there
    assert verdict.is_good
    assert not verdict.edited
    assert 'llmq.load("me/tiny-w4")' in (there / "README.md").read_text()
    assert 'llmq.load("tiny-w4")' in (copy / "README.md").read_text()
    assert hub.heads[0]["tags"] == ["llmq", "quantized", "compressed-tensors", "4-bit"]


def test_an_upload_that_broke_off_goes_on(hub, result):
    shards = sorted(result.glob("*.safetensors"))
    hub.refused_sizes = {shards[1].stat().st_size}
    with pytest.raises(LlmqError) as raised:
        llmq.push(result, "me/tiny-w4", private=False)
    assert "me/tiny-w4: not pushed" in str(raised.value)
    assert f"'llmq push {result} me/tiny-w4 --public' goes on" in str(raised.value)
    assert not hub.repositories["me/tiny-w4"].files
    assert len(hub.puts) == 1
    hub.refused_sizes = set()
    assert llmq.push(result, "me/tiny-w4", private=False).private is False
    assert len(hub.puts) == len(set(hub.puts)) == 2  # what had arrived was not sent again
    files = hub.repositories["me/tiny-w4"].files
    assert all(files[shard.name] == shard.read_bytes() for shard in shards)


def test_an_edited_card_goes_as_it_is(hub, copy):
    (copy / "README.md").write_text("---\nlicense: mit\n---\nmine\n")
    llmq.push(copy, "me/mine")
    assert hub.repositories["me/mine"].files["README.md"] == b"---\nlicense: mit\n---\nmine\n"


def test_a_damaged_file_does_not_go(hub, copy):
    (copy / "config.json").write_text("{}")
    with pytest.raises(VerificationError, match=r"config\.json has 2 bytes"):
        llmq.push(copy, "me/tiny-w4")
    assert not hub.repositories


def test_a_public_repository_is_not_filled_by_chance(hub, result):
    hub.repositories["me/known"] = Repository(private=False)
    with pytest.raises(LlmqError, match="exists and is public; give --public"):
        llmq.push(result, "me/known")
    assert not hub.puts
    assert not llmq.push(result, "me/known", private=False).private


def test_a_private_repository_stays_private(hub, result):
    hub.repositories["me/known"] = Repository(private=True)
    assert llmq.push(result, "me/known", private=False).private


def test_a_file_goes_with_the_card_beside_it(hub, result, tmp_path):
    path = tmp_path / "tiny w4.gguf"
    report = llmq.export(result, path, "gguf")
    assert report.card == f"{path}.md"
    pushed = llmq.push(path, "me/tiny-gguf")
    assert pushed.files == ("README.md", path.name)
    files = hub.repositories["me/tiny-gguf"].files
    assert files[path.name] == path.read_bytes()
    card = files["README.md"].decode()
    assert "hf download me/tiny-gguf 'tiny w4.gguf' --local-dir ." in card
    path.write_bytes(path.read_bytes()[:-64])
    with pytest.raises(LlmqError, match="GGUF"):
        llmq.push(path, "me/other")


@pytest.mark.parametrize("name", ["nobody", "a/b/c", "me/with space", "me/..x", "https://x/me/n"])
def test_names_that_are_none(result, name):
    with pytest.raises(LlmqError, match="expected USER/NAME"):
        llmq.push(result, name)


def test_what_is_checked_before_anything_is_computed(hub, tmp_path, monkeypatch, capsys):
    from huggingface_hub import constants

    out = tmp_path / "out"
    command = ["quantize", "tiny", str(out), *RTN]
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    for options, message in (
        (["--push-to", "me/x"], "--push-to me/x: there is no token for the Hub; log in with"),
        (["--push-to", "x"], "--push-to x: no name of a repository; expected USER/NAME"),
        (["--public"], "--public: is about what is pushed; give --push-to USER/NAME, too"),
    ):
        assert main([*command, *options]) == 2
        assert message in capsys.readouterr().err
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert main(["export", "nowhere", str(out), "--format", "gptq", "--push-to", "me/x"]) == 2
    assert "HF_HUB_OFFLINE is set" in capsys.readouterr().err
    assert main(["qat", "nowhere", str(out), "--push-to", "me"]) == 2
    assert "expected USER/NAME" in capsys.readouterr().err
    assert not out.exists()


def test_a_token_that_may_not_write(hub, result, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    with pytest.raises(LlmqError, match="the Hub does not take the token") as raised:
        llmq.push(result, "me/x")
    assert f"then 'llmq push {result} me/x' goes on" in str(raised.value)


def test_a_hub_that_cannot_be_reached(hub, tmp_path, monkeypatch, capsys):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    out = tmp_path / "out"
    assert main(["quantize", "tiny", str(out), *RTN, "--push-to", "me/x", "--json"]) == 2
    printed = capsys.readouterr()
    error = json.loads(printed.out)["error"]
    assert error.startswith(f"{out} is written; me/x: not pushed (")
    assert f"then 'llmq push {out} me/x' goes on" in error
    assert printed.err.strip().splitlines()[-1] == f"llmq: {error}"
    assert (out / "README.md").is_file()


def test_who_interrupts_it_is_told_how_to_go_on(hub, result, monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", interrupted)
    assert main(["push", str(result), "me/x"]) == 130
    expected = f"interrupted; {result} is written, and 'llmq push {result} me/x' goes on"
    assert expected in capsys.readouterr().err


def test_commands_push_what_they_write(hub, tmp_path, capsys):
    out, other = tmp_path / "out", tmp_path / "gptq"
    assert main(["quantize", "tiny", str(out), *RTN, "--push-to", "me/tiny-w4"]) == 0
    assert f"{hub.endpoint}/me/tiny-w4 (private)" in capsys.readouterr().out
    assert "report.json" in hub.repositories["me/tiny-w4"].files
    command = ["export", str(out), str(other), "--format", "gptq", "--push-to", "me/tiny-gptq"]
    assert main([*command, "--public", "--json"]) == 0
    pushed = json.loads(capsys.readouterr().out)["pushed"]
    assert pushed["repo_id"] == "me/tiny-gptq"
    assert not pushed["private"]
    assert pushed["files"] == sorted(hub.repositories["me/tiny-gptq"].files)
    assert main(["push", str(other), "me/again"]) == 0
    text = capsys.readouterr().out
    assert f"{hub.endpoint}/me/again (private)" in text
    assert f"{hub.endpoint}/me/again/commit/" in text


def test_the_endpoint_and_the_token_are_those_of_the_environment(result, tmp_path):
    with model_hub() as state:
        environment = {name: own for name, own in os.environ.items() if not name.startswith("HF_")}
        environment |= {"HF_ENDPOINT": state.endpoint, "HF_TOKEN": TOKEN}
        environment |= {"HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
        command = [sys.executable, "-m", "llmq", "push", str(result), "me/tiny-w4", "--json"]
        settings = {"capture_output": True, "text": True, "env": environment, "timeout": 120}
        done = subprocess.run(command, **settings)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["private"]
        assert "config.json" in state.repositories["me/tiny-w4"].files
