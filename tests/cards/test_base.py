"""Which model a card names as its base, and who says so."""

import json

import pytest

from llmq.cards.base import Base, base_of, is_id

COMMIT = "0123456789abcdef0123456789abcdef01234567"
PACKED = {"quantization_config": {"quant_method": "gptq", "bits": 4}}
FP8 = {"quantization_config": {"quant_method": "fp8"}}


@pytest.fixture
def folder_of(tmp_path):
    """A folder with a config and the head of a card, in the Hub's cache under an id or local."""

    def make(config=None, head=None, hub_id=None, report=None):
        place = tmp_path / "local"
        if hub_id is not None:
            repo = f"models--{hub_id.replace('/', '--')}"
            place = tmp_path / repo / "snapshots" / COMMIT
        place.mkdir(parents=True)
        (place / "config.json").write_text(json.dumps(config or {}))
        if head is not None:
            (place / "README.md").write_text(f"---\n{head}\n---\n# text\n")
        if report is not None:
            (place / "report.json").write_text(json.dumps(report))
        return place

    return make


def test_a_folder_of_the_cache_says_its_own_name(folder_of):
    head = "base_model: Qwen/Qwen3-0.6B-Base\nlicense: apache-2.0"
    base = base_of(folder_of({"_name_or_path": "some/other"}, head, hub_id="Qwen/Qwen3-0.6B"))
    assert (base.ids, base.revision) == (("Qwen/Qwen3-0.6B",), COMMIT)
    assert (base.relation, base.named_by) == ("quantized", "cache")
    assert base.head == {"license": "apache-2.0"}


@pytest.mark.parametrize(
    ("config", "head", "ids", "relation", "named_by"),
    [
        ({"_name_or_path": "Qwen/Qwen3-0.6B"}, None, ("Qwen/Qwen3-0.6B",), "quantized", "config"),
        # What a model in full precision was trained from is not what is quantized here.
        ({"_name_or_path": "a/b"}, "base_model: c/d", ("c/d",), "finetune", "card"),
        ({}, "base_model: c/d\nbase_model_relation: merge", ("c/d",), "merge", "card"),
        (PACKED, "base_model: c/d", ("c/d",), "quantized", "card"),
        (PACKED, "base_model: c/d\nbase_model_relation: finetune", ("c/d",), "finetune", "card"),
        ({}, "base_model: [a/b, c/d]", ("a/b", "c/d"), "finetune", "card"),
        ({"_name_or_path": "/home/me/model"}, "license: mit", (), "quantized", ""),
        ({"_name_or_path": "out/checkpoint-500"}, None, (), "quantized", ""),
        ({"_name_or_path": COMMIT}, None, (), "quantized", ""),
        ({"_name_or_path": ["a/b"]}, "base_model: {a: b}", ("a/b",), "quantized", "config"),
    ],
)
def test_a_local_folder(config, head, ids, relation, named_by, folder_of):
    base = base_of(folder_of(config, head))
    assert (base.ids, base.relation, base.named_by) == (ids, relation, named_by)
    assert (base.name, base.revision) == ("local", None)


def test_a_quantized_folder_names_what_it_was_made_of(folder_of):
    made = Base("a/b", ("a/b",), COMMIT, "quantized", "cache", {"license": "mit"})
    folder = folder_of(PACKED, "license: mit", report={"base_model": made.to_json()})
    assert base_of(folder) == made


def test_a_quantized_folder_of_the_cache(folder_of):
    assert base_of(folder_of(PACKED, "base_model: a/b", "me/b-gptq")).ids == ("a/b",)


@pytest.mark.parametrize("config", [PACKED, FP8])
def test_without_another_name_it_is_its_own(config, folder_of):
    assert base_of(folder_of(config, hub_id="me/b-fp8")).ids == ("me/b-fp8",)


def test_what_is_published_in_fp8_alone_is_full_precision(folder_of):
    assert base_of(folder_of(FP8, "base_model: a/b", "a/b-fp8")).ids == ("a/b-fp8",)


@pytest.mark.parametrize("record", [3, {"name": 3}, {"name": "x", "ids": [3, "/etc/passwd"]}])
def test_a_record_that_is_none_is_not_believed(record, folder_of):
    assert base_of(folder_of(PACKED, report={"base_model": record})).ids == ()


def test_names():
    assert is_id("Qwen/Qwen3-0.6B")
    for name in ("tiny", "a/b/c", "/a/b", "./b", "~/b", "a/checkpoint-5", "a b/c", "", None, 3):
        assert not is_id(name), name
