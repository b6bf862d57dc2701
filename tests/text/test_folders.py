"""Folders as people have them: written by save_to_disk, clones of data sets, and collections."""

import json

import datasets
import pandas
import pytest

from llmq.errors import LlmqError
from llmq.text.documents import read_text

CARD = """---
configs:
- config_name: {0}
  data_files:
  - split: train
    path: {0}/train-*
- config_name: {1}
  data_files:
  - split: train
    path: {1}/train-*
---
"""


@pytest.fixture
def put(tmp_path):
    """A function that writes one row with a text into a file of the folder."""

    def write(name, text):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".parquet":
            pandas.DataFrame({"text": [text]}).to_parquet(path)
        else:
            is_text = path.suffix in (".txt", ".md")
            path.write_text(text if is_text else json.dumps({"text": text}) + "\n")

    return write


def read(source, purpose="calibration"):
    return read_text(str(source), purpose).documents


def test_a_data_set_that_was_saved(tmp_path):
    rows = {name: datasets.Dataset.from_list([{"text": name}]) for name in ("train", "test", "x")}
    rows["train"].save_to_disk(tmp_path / "one")
    assert read(tmp_path / "one") == ["train"]
    datasets.DatasetDict(rows).save_to_disk(tmp_path / "all")
    assert read(tmp_path / "all") == ["train"]
    assert read(tmp_path / "all", "eval") == ["test"]
    assert read(f"{tmp_path}/all:x") == ["x"]
    with pytest.raises(LlmqError, match="no split 'y'; it has train, test, x"):
        read(f"{tmp_path}/all:y")
    datasets.DatasetDict({"a": rows["x"], "b": rows["x"]}).save_to_disk(tmp_path / "odd")
    with pytest.raises(LlmqError, match=r"no split 'train', but a, b; name one, such as .*odd::a"):
        read(tmp_path / "odd")
    (tmp_path / "one" / "state.json").write_text("{")
    with pytest.raises(LlmqError, match="not readable as a data set that save_to_disk wrote"):
        read(tmp_path / "one")


def test_a_clone_of_a_data_set(put, tmp_path):
    for split in ("train_sft", "test_sft"):
        put(f"data/{split}-00000-of-00001.parquet", split)
    put("README.md", "no text of the data")
    with pytest.raises(LlmqError, match="has no split 'train', but test_sft, train_sft; name one"):
        read(tmp_path)
    assert read(f"{tmp_path}:test_sft") == ["test_sft"]
    text = read_text(f"{tmp_path}::train_sft", "calibration")
    assert text.read["files_left_out"] == 1
    assert (text.read["split"], text.documents) == ("train_sft", ["train_sft"])


def test_splits_are_told_by_the_names_of_rows_and_not_of_texts(put, tmp_path):
    put("rows/train.jsonl", "a")
    put("rows/test.jsonl", "b")
    assert read(tmp_path / "rows") == ["a"]
    assert read(tmp_path / "rows", "eval") == ["b"]
    put("pages/train.md", "a")
    put("pages/guide/testing.md", "b")
    put("pages/.git/notes.txt", "hidden")
    assert read(tmp_path / "pages") == ["b", "a"]


def test_configurations_are_named(put, tmp_path):
    for name in ("small", "large"):
        put(f"{name}/train-00000-of-00001.parquet", name)
    put("README.md", CARD.format("small", "large"))
    with pytest.raises(LlmqError, match=r"configurations small, large; name one, such as .*:small"):
        read(tmp_path)
    assert read(f"{tmp_path}:large") == ["large"]
    assert read(f"{tmp_path}:large:train") == ["large"]


def test_a_collection_is_read_as_a_whole(put, tmp_path):
    for name in ("a.jsonl", "b.txt", "c.parquet"):
        put(name, name)
    put("README.md", "about these files")
    (tmp_path / "dataset_infos.json").write_text("{}")
    assert read(tmp_path) == ["a.jsonl", "b.txt", "c.parquet"]
    put("other/x.jsonl", "x")
    put("other/y.jsonl", "y")
    put("other/z.txt", "z")
    assert read(tmp_path / "other", "eval") == ["x", "y", "z"]
