"""What belongs to a checkpoint comes along, what does not stays behind and is listed, and nothing
that is written says where on this machine the source lay."""

import json
from pathlib import Path

import pytest

import llmq
from llmq.models.companions import MAX_BYTES, copy_companions, find_companions
from llmq.models.identity import hub_id, model_name, without_places
from llmq.models.source import resolve
from llmq.ptq.job import prepare
from llmq.ptq.run import quantize_folder
from llmq.recipe import Recipe

RTN = Recipe.uniform("w8", method="rtn")
BELONGS = (
    "tokenizer.json",
    "tokenizer.model",
    "qwen.tiktoken",
    "merges.txt",
    "vocab.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/tools.jinja",
    "generation_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "LICENSE",
    "license.md",
    "LICENCE-MIT.txt",
    "Llama-COPYING",
    "NOTICE.txt",
    "THIRD_PARTY_NOTICES.txt",
    "USE_POLICY.md",
)
STAYS = (
    "README.md",
    "pytorch_model.bin",
    "tokenizer.pkl",
    "LICENSE.pt",
    "chat_template.bin",
    "training_args.bin",
    "optimizer.pth",
    "pytorch_model.bin.index.json",
    "model.safetensors.index.json",
    "quantize_config.json",
    "quant_config.json",
    "consolidated.safetensors",
    "trainer_state.json",
    "evil.py",
    "adapter_config.json",
    "original/params.json",
    "licensing.exe",
)


def fill(folder: Path, names) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")


def test_what_belongs_comes_along_and_the_rest_is_listed(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    target.mkdir()
    fill(source, (*BELONGS, *STAYS, "config.json", "model.safetensors"))
    found = copy_companions(source, target, {"model.safetensors"})
    copied = {path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file()}
    assert copied == set(BELONGS) == set(found.files)
    assert set(found.left_behind) == {name.replace("/params.json", "/") for name in STAYS}
    assert all(found.left_behind.values())


def test_code_that_auto_map_names_comes_along_with_what_it_imports(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    target.mkdir()
    fill(source, ["evil.py", "other.py", "parts/deep.py"])
    auto_map = {
        "AutoConfig": "configuration_it.ItConfig",
        "AutoModelForCausalLM": "modeling_it.ItForCausalLM",
        "AutoModel": "gone.ItModel",
        "AutoTokenizer": ["elsewhere/repo--tokenization_it.It", None],
    }
    (source / "config.json").write_text(json.dumps({"auto_map": auto_map}))
    tokenizer = {"auto_map": {"AutoTokenizer": ["tokenization_it.It", None]}, "model_max_length": 9}
    (source / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    (source / "configuration_it.py").write_text("raise SystemExit('never run')")
    (source / "modeling_it.py").write_text(
        "from .configuration_it import It\nfrom . import other\nfrom .parts.deep import x\nimport "
        "os"
    )
    found = copy_companions(source, target)
    code = ["configuration_it.py", "modeling_it.py", "other.py", "parts/deep.py"]
    assert sorted(name for name in found.files if name.endswith(".py")) == code
    assert (target / "parts" / "deep.py").is_file()
    assert found.left_behind["evil.py"] == "code that no auto_map names"
    assert found.dropped == {"gone.ItModel", "tokenization_it.It"}
    kept = found.adapt({"auto_map": auto_map, "a": 1})
    assert kept == {"a": 1, "auto_map": {k: v for k, v in auto_map.items() if k != "AutoModel"}}
    written = json.loads((target / "tokenizer_config.json").read_text())
    assert written == {"model_max_length": 9}


@pytest.mark.parametrize(
    "reference", ["../outside.It", "a..b.It", "/etc/x.It", "broken.It", "importing.It", "noclass"]
)
def test_code_that_is_not_there_as_a_whole_is_dropped(reference, tmp_path):
    source = tmp_path / "source"
    fill(source, ["config.json"])
    (tmp_path / "outside.py").write_text("x = 1")
    (source / "broken.py").write_text("def (")
    (source / "importing.py").write_text("from .missing import x")
    (source / "config.json").write_text(json.dumps({"auto_map": {"AutoConfig": reference}}))
    found = find_companions(source)
    assert found.dropped == {reference}
    assert not [name for name in found.files if name.endswith(".py")]


def test_links_are_followed_inside_the_folder_and_in_the_cache_of_the_hub_only(tmp_path):
    (tmp_path / "secret").write_text("a key")
    plain = tmp_path / "plain"
    fill(plain, ["really.txt"])
    (plain / "LICENSE").symlink_to(tmp_path / "secret")
    (plain / "NOTICE").symlink_to("really.txt")
    (plain / "tokenizer.json").symlink_to("nowhere")
    found = find_companions(plain)
    assert found.files == ["NOTICE"]
    assert "leads out of the folder" in found.left_behind["LICENSE"]
    snapshot = tmp_path / "models--someone--small" / "snapshots" / "0123"
    blobs = tmp_path / "models--someone--small" / "blobs"
    fill(blobs, ["abc"])
    snapshot.mkdir(parents=True)
    (snapshot / "LICENSE").symlink_to("../../blobs/abc")
    (snapshot / "NOTICE").symlink_to(tmp_path / "secret")
    assert find_companions(snapshot).files == ["LICENSE"]
    (tmp_path / "target").mkdir()
    copy_companions(snapshot, tmp_path / "target")
    assert not (tmp_path / "target" / "LICENSE").is_symlink()
    assert hub_id(snapshot) == model_name(snapshot) == "someone/small"
    assert hub_id(plain) is None


def test_files_that_are_too_large_to_belong_stay_behind(tmp_path):
    with (tmp_path / "tokenizer.json").open("wb") as file:
        file.truncate(MAX_BYTES + 1)
    assert "larger than" in find_companions(tmp_path).left_behind["tokenizer.json"]


def test_places_are_left_out_of_json_at_any_depth():
    data = {
        "_name_or_path": "/home/me/model",
        "text_config": {"_name_or_path": "owner/name", "vocab_file": "~/v.json", "a": [1]},
        "tokenizer_file": "C:\\models\\tokenizer.json",
        "vocab_file": "vocab.json",
    }
    cleaned = {"text_config": {"a": [1]}, "vocab_file": "vocab.json"}
    assert without_places(data) == cleaned
    assert without_places(data, "owner/name") == {"_name_or_path": "owner/name", **cleaned}


def test_no_output_says_where_the_source_lay(model_folder, calibration_file, tmp_path):
    folder = model_folder()
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text()) | {"name_or_path": str(folder), "auto_map": {}}
    path.write_text(json.dumps(settings))
    fill(folder, ["LICENSE", "README.md", "preprocessor_config.json"])
    recipe = Recipe.uniform("w4g32", samples=2, sequence_length=16)
    job = prepare(str(folder), recipe, calibration=str(calibration_file))
    report = quantize_folder(job, tmp_path / "out")
    assert report["left_behind"] == {"README.md": "the source's own card; the output has another"}
    assert {"LICENSE", "preprocessor_config.json"} <= set(report["companions"])
    model = llmq.load(folder)
    llmq.quantize(model, RTN)
    llmq.save(model, tmp_path / "saved")
    model.save_pretrained(tmp_path / "pretrained")
    assert (tmp_path / "saved" / "LICENSE").is_file()
    assert (tmp_path / "saved" / "tokenizer.json").read_bytes() == (
        folder / "tokenizer.json"
    ).read_bytes()
    for name in ("out", "saved", "pretrained"):
        for file in (tmp_path / name).rglob("*"):
            if file.is_file():
                content = file.read_bytes()
                assert str(tmp_path).encode() not in content, file
                assert str(calibration_file.parent).encode() not in content, file


def test_a_model_from_the_cache_of_the_hub_goes_by_its_id(model_folder, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    repo = tmp_path / "hub" / "models--someone--small"
    (repo / "snapshots").mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("0123456789abcdef0123456789abcdef01234567")
    model_folder().rename(repo / "snapshots" / "0123456789abcdef0123456789abcdef01234567")
    job = prepare(str(resolve("someone/small")), RTN)
    report = quantize_folder(job, tmp_path / "out")
    assert report["model"] == "someone/small"
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["_name_or_path"] == "someone/small"
    assert "base_model: someone/small" in (tmp_path / "out" / "README.md").read_text()
