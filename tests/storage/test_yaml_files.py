"""YAML is read as JSON would be. What is refused is in the test of recipe files."""

import pytest

from llmq.errors import LlmqError
from llmq.storage.yaml_files import read_yaml


def test_values_are_those_of_json(tmp_path):
    path = tmp_path / "values.yaml"
    path.write_text("a: 1e-4\nb: 1_000\nc: [yes, null, '1', -2.5e+3, .5e1]\nd: {e: text}\n")
    assert read_yaml(path, "values", "mend it") == {
        "a": 1e-4,
        "b": 1000,
        "c": [True, None, "1", -2500.0, 5.0],
        "d": {"e": "text"},
    }


def test_aliases_do_not_grow(tmp_path):
    """Nine lists of nine aliases each would be 9^9 values."""
    lines = ["a0: &a0 [x]"]
    for i in range(1, 10):
        aliases = ", ".join([f"*a{i - 1}"] * 9)
        lines.append(f"a{i}: &a{i} [{aliases}]")
    path = tmp_path / "bomb.yaml"
    path.write_text("\n".join(lines))
    with pytest.raises(LlmqError, match=r"line 2: what begins with \* is an alias"):
        read_yaml(path, "values", "mend it")


def test_a_merge_is_a_key_that_nobody_knows(tmp_path):
    path = tmp_path / "merge.yaml"
    path.write_text("<<: {a: 1}\nb: 2\n")
    with pytest.raises(LlmqError, match="line 1: keys are text"):
        read_yaml(path, "values", "mend it")
