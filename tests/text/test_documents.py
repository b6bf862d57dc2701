"""Texts and tokens: every source, seeds and hashes, and what cannot be used."""

import json
import os
from types import SimpleNamespace

import pandas
import pytest
import torch

from llmq.errors import LlmqError
from llmq.text import corpus, documents, hub


def test_every_local_source_gives_the_same_documents(tmp_path):
    texts = ["first text", "second text"]
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps({"text": text, "id": i}) + "\n" for i, text in enumerate(texts))
    )
    pandas.DataFrame({"text": texts}).to_parquet(tmp_path / "rows.parquet")
    folder = tmp_path / "folder"
    folder.mkdir()
    for i, text in enumerate(texts):
        (folder / f"{i}.txt").write_text(text)
    (folder / "ignored.csv").write_text("x")
    for source in (tmp_path / "rows.jsonl", tmp_path / "rows.parquet", folder):
        assert documents.load_documents(str(source), "calibration") == texts


class Builder:
    """Of datasets, for a data set without a list of splits."""

    config = SimpleNamespace(data_files=None)
    info = SimpleNamespace(splits=None)

    def __init__(self, seen, rows):
        self.seen, self.rows = seen, rows

    def as_streaming_dataset(self, split):
        self.seen["split"] = split
        return self.rows


def test_hub_data_set_names_are_split(monkeypatch):
    seen = {}

    def load_dataset_builder(name, config, data_files, revision):
        seen.update(name=name, config=config, revision=revision)
        return Builder(seen, [{"text": "a"}, {"text": ""}, {"text": "b"}])

    monkeypatch.setattr("datasets.load_dataset_builder", load_dataset_builder)
    assert documents.load_documents("someone/texts:small:validation", "eval", "r1") == [
        "a",
        "",
        "b",
    ]  # empty rows make the blank lines of published figures
    assert seen == {
        "name": "someone/texts",
        "config": "small",
        "revision": "r1",
        "split": "validation",
    }
    documents.load_documents("someone/texts", "eval")
    assert (seen["config"], seen["split"]) == (None, "train")


def test_long_hub_data_sets_are_cut_with_a_warning_and_files_are_not(monkeypatch, tmp_path):
    monkeypatch.setattr(hub, "MAX_DOCUMENTS", 3)
    rows = [{"text": str(i)} for i in range(5)]
    monkeypatch.setattr("datasets.load_dataset_builder", lambda *a, **k: Builder({}, rows))
    with pytest.warns(UserWarning, match="someone/texts: the first 3 documents are used"):
        assert documents.load_documents("someone/texts", "train") == ["0", "1", "2"]
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps({"text": str(i)}) + "\n" for i in range(5))
    )
    assert len(documents.load_documents(str(tmp_path / "rows.jsonl"), "train")) == 5


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.txt", None, "no such file"),
        ("empty.txt", b"  \n", "holds no text"),
        ("binary.txt", b"\xff\xfe\x00", "not UTF-8"),
        ("bad.jsonl", b"{not json", "not readable as .jsonl"),
        ("columns.jsonl", b'{"body": "x"}\n', "expected a column 'text'"),
        ("bad.parquet", b"PAR0", "not readable as .parquet"),
    ],
)
def test_unusable_files_are_explained(tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(LlmqError, match=message):
        documents.load_documents(str(path), "calibration")


def test_an_unreachable_data_set_is_explained():
    with pytest.raises(LlmqError, match="cannot be read with HF_HUB_OFFLINE=1; unset it"):
        documents.load_documents("someone/no-such-data", "calibration")


def test_windows_are_seeded_and_hashed(tokenizer):
    tokens = documents.tokenize(["some text to cut " * 300], tokenizer)
    first, again, other = (
        documents.calibration_windows(tokens, 5, 32, seed, "text") for seed in (0, 0, 1)
    )
    assert torch.equal(first.tokens, again.tokens)
    assert first.sha256 == again.sha256 != other.sha256
    assert first.tokens.shape == (5, 32)
    assert all(
        any(torch.equal(window, tokens[i : i + 32]) for i in range(len(tokens)))
        for window in first.tokens
    )
    with_bos = documents.calibration_windows(tokens, 5, 32, 0, "text", bos=7)
    assert (with_bos.tokens[:, 0] == 7).all()
    assert torch.equal(with_bos.tokens[:, 1:], first.tokens[:, 1:])


def test_too_little_text_and_foreign_tokens():
    with pytest.raises(LlmqError, match="5 tokens, but one sequence needs 32"):
        documents.calibration_windows(torch.arange(5), 2, 32, 0, "short.txt")
    with pytest.raises(
        LlmqError, match=r"x\.txt: token id 9 is beyond the model's vocabulary of 9"
    ):
        documents.check_vocabulary(torch.tensor([1, 9]), 9, "x.txt")


def test_bundled_text_has_disjoint_splits():
    splits = {split: set(corpus.standard_library_documents(split)) for split in corpus.SPLITS}
    assert sum(map(len, splits["train"])) > 3_000_000
    for split in ("calibration", "eval"):
        assert sum(map(len, splits[split])) > 100_000
        assert not (splits[split] & splits["train"]) - {""}
    with pytest.raises(ValueError, match="unknown split"):
        corpus.standard_library_documents("test")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("deep.jsonl", b"[" * 100_000, "nested too deep"),
        ("closed.jsonl", b'{"text": "a", "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested"),
        ("deep.json", b"[" * 100_000, "not readable as .json"),
        ("empty.jsonl", b"", "holds no text"),
        ("blank.jsonl", b"\n\n", "holds no text"),
        ("list.jsonl", b"[1]\n", "line 1: expected an object, got list"),
        ("half.jsonl", b'{"text": "\\ud800"}\n', "half of a surrogate pair"),
        ("bytes.jsonl", b'{"text": "\xff"}\n', "not readable as .jsonl"),
        ("missing.jsonl", b'{"text": "a"}\n{"other": 1}\n', "found columns other in row 1"),
        ("cut.parquet", b"PAR1" + bytes(50) + b"PAR1", "not readable as .parquet"),
    ],
)
def test_hostile_rows_are_refused(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(LlmqError, match=message):
        documents.load_documents(str(tmp_path / name), "calibration")


def test_what_is_no_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")
    for source in (str(tmp_path / "pipe.txt"), str(tmp_path), "/dev/zero"):
        with pytest.raises(LlmqError, match="expected a regular file"):
            documents.load_documents(source, "calibration")


def test_rows_of_json_may_be_lines_or_a_list_with_or_without_a_mark(tmp_path):
    (tmp_path / "lines.json").write_bytes(b'\xef\xbb\xbf{"text": "a"}\n\n{"text": "b", "n": [1]}')
    (tmp_path / "list.json").write_text('\n [{"text": "a"}, {"text": "b"}]')
    for name in ("lines.json", "list.json"):
        assert documents.load_documents(str(tmp_path / name), "calibration") == ["a", "b"]
