"""The boundary to files of others: every exception one typed line, bounded JSON, regular files."""

import json
import os

import pytest
import torch
from tokenizers import Tokenizer

from llmq.errors import LlmqError
from llmq.storage.boundary import check_folder, check_regular, out_of_memory, reading, running
from llmq.storage.json_files import MAX_DEPTH, read_object


def _panic():
    """A panic of Rust code, which is no Exception."""
    definition = {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"Regex": "(a+)+$"},
            "behavior": "Isolated",
            "invert": False,
        },
        "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []},
    }
    Tokenizer.from_str(json.dumps(definition)).encode("a" * 40 + "!")


def _recursion():
    return _recursion()


@pytest.mark.parametrize(
    "fault",
    [_panic, _recursion, lambda: {}["x"], lambda: int("x"), lambda: None.x, lambda: 1 / 0],
    ids=["panic", "recursion", "key", "value", "attribute", "division"],
)
def test_whatever_is_raised_becomes_one_line(fault):
    with (
        pytest.raises(LlmqError, match=r"^a\.json: not a config \(.+\); do this$") as caught,
        reading("a.json", "not a config", "do this"),
    ):
        fault()
    assert str(caught.value).isprintable()
    with pytest.raises(LlmqError, match="the model cannot be run"), running("model"):
        fault()


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:9"),
        torch.distributed.DistBackendError("the watchdog found a timeout"),
    ],
)
def test_a_process_that_is_gone_is_no_fault_of_the_model(error):
    with pytest.raises(LlmqError, match="another process of this run is gone"), running("model"):
        raise error


@pytest.mark.parametrize("passed", [KeyboardInterrupt, SystemExit, LlmqError])
def test_requests_to_stop_and_own_errors_pass(passed):
    for boundary in (reading("a", "b", "c"), running("a")):
        with pytest.raises(passed), boundary:
            raise passed("as it was")


def test_want_of_memory_is_told_as_such():
    with pytest.raises(LlmqError, match="a: out of memory"), reading("a", "b", "c"):
        torch.empty(1 << 60, dtype=torch.uint8)
    with pytest.raises(MemoryError), running("a"):
        raise MemoryError
    assert out_of_memory(ValueError("x")) is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a thing: no JSON"),
        (b"[1]", "expected a JSON object, got a list"),
        (b"null", "got null"),
        (b"\xff\xfe", "not a thing"),
        (b"[" * 100_000, "no JSON .*RecursionError"),
        (b'{"a":' * 80 + b"1" + b"}" * 80, f"nested more than {MAX_DEPTH} deep"),
        (b'{"a": 1, "a": 2}', "key 'a' appears twice"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not a thing"),
    ],
)
def test_json_that_is_no_object_is_refused(content, message, tmp_path):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(LlmqError, match=rf"x\.json: {message}|{message}"):
        read_object(tmp_path / "x.json", "a thing", unique_keys=True)


def test_files_that_are_too_large_or_missing_are_refused(tmp_path):
    (tmp_path / "x.json").write_text('{"a": 1}')
    assert read_object(tmp_path / "x.json", "a thing") == {"a": 1}
    with pytest.raises(LlmqError, match="8 bytes, expected at most 4"):
        read_object(tmp_path / "x.json", "a thing", max_bytes=4)
    with pytest.raises(LlmqError, match="No such file"):
        read_object(tmp_path / "y.json", "a thing")


def test_pipes_devices_and_folders_are_not_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    for name, found in (("pipe", "a named pipe"), ("zero", "a device"), ("folder", "a folder")):
        with pytest.raises(LlmqError, match=f"expected a regular file, found {found}"):
            check_regular(tmp_path / name)
    check_regular(tmp_path / "file")
    check_regular(tmp_path / "missing")
    with pytest.raises(LlmqError, match="a named pipe"):
        check_folder(tmp_path)
