"""Texts by name: streamed from a Hub on this machine, kept, and read again without it."""

import gzip
import json
import os
import subprocess
import sys

import pandas
import pytest
from hub_data import COMMIT, data_hub

from llmq.errors import LlmqError
from llmq.storage import seals
from llmq.text import presets
from llmq.text.documents import read_text

CHAT = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
# What is read of each data set, with another answer in a process of its own: the address of the Hub
# is looked at when its library is imported.
READ = """
import json, sys
from llmq.errors import LlmqError
from llmq.text.documents import read_text

found = {}
for name in sys.argv[1:]:
    purpose = "eval" if name.endswith("!") else "calibration"
    try:
        text = read_text(name.removesuffix("!"), purpose)
        found[name] = {**text.read, "first": text.documents[0], "error": None}
    except LlmqError as error:
        found[name] = {"error": str(error)}
print(json.dumps(found))
"""


def card(*configs: str, splits: tuple[str, ...] = ("train", "test"), folder: bool = True) -> str:
    """A card that names the files of configurations and their splits."""
    lines = ["---", "configs:"]
    for config in configs:
        lines += [f"- config_name: {config}", "  data_files:"]
        for split in splits:
            lines += [f"  - split: {split}", f"    path: {config if folder else 'data'}/{split}-*"]
    return "\n".join([*lines, "---", ""])


@pytest.fixture
def hub_folder(tmp_path):
    """The data sets of the presets, a few rows each."""
    root = tmp_path / "hub"

    def put(path, rows):
        path = root / path
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".parquet":
            pandas.DataFrame(rows).to_parquet(path)
            return
        text = rows if isinstance(rows, str) else "".join(json.dumps(row) + "\n" for row in rows)
        path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())

    chats, texts, code = "HuggingFaceH4/ultrachat_200k", "Salesforce/wikitext", "theblackcat102"
    for split in ("train_sft", "test_sft"):
        rows = [{"prompt": split, "messages": CHAT}] * 3
        put(f"{chats}/data/{split}-00000-of-00001.parquet", rows)
    put(f"{chats}/README.md", card("default", splits=("train_sft", "test_sft"), folder=False))
    for config in ("wikitext-2-raw-v1", "wikitext-103-v1"):
        for split in ("train", "test"):
            rows = [{"text": f"{config} {split}"}, {"text": ""}]
            put(f"{texts}/{config}/{split}-00000-of-00001.parquet", rows)
    put(f"{texts}/README.md", card("wikitext-2-raw-v1", "wikitext-103-v1"))
    put("allenai/c4/en/c4-train.00001-of-01024.json.gz", [{"text": "crawled", "url": "x"}] * 2)
    put("allenai/c4/en/c4-validation.00000-of-00008.json.gz", [{"text": "held back"}])
    put(f"{code}/evol-codealpaca-v1/train.jsonl", [{"instruction": "Add.", "output": "1 + 1"}])
    return root


@pytest.fixture
def read(tmp_path):
    """A function that reads texts in a process of its own."""

    def run(endpoint, *names, **more):
        kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        environment = {
            **kept,
            "HF_ENDPOINT": endpoint,
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "LLMQ_CACHE_DIR": str(tmp_path / "cache"),
            **more,
        }
        command = [sys.executable, "-c", READ, *names]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
        assert done.returncode == 0, done.stderr
        assert done.stderr == "", "no bars, no remarks"
        return json.loads(done.stdout)

    return run


def test_presets_are_downloaded_once_and_name_their_commit(hub_folder, read, tmp_path, monkeypatch):
    names = ["ultrachat", "ultrachat!", "c4", "c4!", "wikitext", "wikitext!", "code"]
    choices = ["Salesforce/wikitext", "HuggingFaceH4/ultrachat_200k", "allenai/none"]
    with data_hub(hub_folder) as endpoint:
        found = read(endpoint, *names, "code!", *choices)
    firsts = ["Why?\n\nSo."] * 2 + ["crawled", "held back"]
    firsts += ["wikitext-2-raw-v1 train", "wikitext-2-raw-v1 test", "Add.\n\n1 + 1"]
    assert [found[name]["first"] for name in names] == firsts
    assert {found[name]["revision"] for name in names} == {COMMIT}
    assert found["ultrachat"]["split"] == "train_sft"
    assert found["wikitext"]["config"] == "wikitext-2-raw-v1"
    assert found["ultrachat"]["columns"] == [["messages"]]
    assert "no part that is held back" in found["code!"]["error"]
    # Names typed bare: what there is to choose from.
    configs = "configurations wikitext-2-raw-v1, wikitext-103-v1; name one, such as "
    assert configs + "Salesforce/wikitext:wikitext-2-raw-v1" in found[choices[0]]["error"]
    assert "has no split 'train', but train_sft, test_sft" in found[choices[1]]["error"]
    assert "as a Hub data set it failed" in found[choices[2]]["error"]
    # The Hub is gone.
    again = read(endpoint, *names, HF_HUB_OFFLINE="1")
    assert again == {name: found[name] for name in names}
    (tmp_path / "cache" / "text" / "c4-train.json").write_text("damaged")
    monkeypatch.setenv("LLMQ_CACHE_DIR", str(tmp_path / "cache"))
    with pytest.raises(LlmqError, match="c4: allenai/c4 was not downloaded yet"):
        read_text("c4", "calibration")


def test_without_the_hub_there_is_a_remedy(monkeypatch, tmp_path):
    def unreachable(*arguments):
        raise ConnectionError("no route")

    monkeypatch.setenv("LLMQ_CACHE_DIR", str(tmp_path))
    with pytest.raises(LlmqError, match="was not downloaded yet, and HF_HUB_OFFLINE=1 is set"):
        read_text("ultrachat", "calibration")
    monkeypatch.setattr(presets, "is_offline", lambda: False)
    monkeypatch.setattr(presets, "open_rows", unreachable)
    message = r"ultrachat: .* cannot be downloaded \(no route\); check .* give a file, or 'self'"
    with pytest.raises(LlmqError, match=message):
        read_text("ultrachat", "calibration")


def test_what_is_kept_goes_through_the_template_of_each_model(monkeypatch, tmp_path, tokenizer):
    monkeypatch.setenv("LLMQ_CACHE_DIR", str(tmp_path))
    path = presets.cached_path("ultrachat", "calibration")
    path.parent.mkdir()
    kept = {"dataset": "d", "config": None, "split": "s", "revision": "r"}
    seals.write_sealed(path, {**kept, "rows": [{"messages": CHAT}]})
    assert read_text("ultrachat", "calibration", tokenizer).documents == ["Why?\n\nSo."]
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    monkeypatch.setattr(tokenizer, "chat_template", template, raising=False)
    text = read_text("ultrachat", "calibration", tokenizer)
    assert text.documents == ["<user>Why?<assistant>So."]
    assert {name: text.read[name] for name in kept} == kept


def test_only_as_many_rows_as_are_needed(monkeypatch):
    monkeypatch.setattr(presets, "MAX_CHARACTERS", 100)
    seen = []

    def rows():
        for number in range(1000):
            seen.append(number)
            yield {"text": "x" * 30, "url": "y"}

    assert presets._first_rows(rows()) == [{"text": "x" * 30}] * 3
    assert len(seen) == 3


def test_a_file_of_the_name_of_a_preset_is_told_of(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LLMQ_CACHE_DIR", str(tmp_path))
    (tmp_path / "code").write_text("mine")
    with (
        pytest.warns(UserWarning, match=r"for what lies here write \./code"),
        pytest.raises(LlmqError, match="HF_HUB_OFFLINE"),
    ):
        read_text("code", "calibration")
    assert read_text("./code", "calibration").documents == ["mine"]
