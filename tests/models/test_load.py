"""Finding models: folders, the bundled one, the Hub through a full cache and through an endpoint on
this machine; and every way in which that fails."""

import json
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from conftest import FAMILY_CONFIGS, families, make_model
from hub_data import COMMIT, StubHandler, served
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

import llmq
from llmq.errors import LlmqError
from llmq.models.arch import find_blocks, needs_bos, quantizable_layers
from llmq.models.names import match_names
from llmq.models.shards import ShardReader
from llmq.models.source import load_config, load_tokenizer, meta_model, resolve
from llmq.ptq.job import prepare
from llmq.ptq.run import quantize_folder
from llmq.recipe import Recipe


def fill_cache(cache: Path, folder: Path) -> None:
    """Lay out a model as huggingface_hub caches it."""
    repo = cache / "models--someone--small"
    shutil.copytree(folder, repo / "snapshots" / COMMIT)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(COMMIT)
    (repo / "refs" / "v1").write_text(COMMIT)


@pytest.mark.parametrize("arguments", [[], ["--revision", "v1"]])
def test_hub_model_from_a_full_cache_without_network(model_folder, tmp_path, arguments):
    fill_cache(tmp_path / "hub", model_folder())
    command = [
        sys.executable,
        "-m",
        "llmq",
        "plan",
        "someone/small",
        "--method",
        "rtn",
        "--json",
        *arguments,
    ]
    environment = {
        **__import__("os").environ,
        "HF_HUB_CACHE": str(tmp_path / "hub"),
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["layers"]) == 14


class StubHub(StubHandler):
    """As much of the Hub's interface as a download needs, serving one folder; a private repository
    answers only to a token."""

    folder: Path
    requests: list[tuple[str, str | None]]

    def do_GET(self) -> None:
        self.requests.append((self.path, self.headers.get("Authorization")))
        if (
            "someone/private" in self.path
            and self.headers.get("Authorization") != "Bearer hf_secret"
        ):
            return self._answer(401, X_Error_Code="RepoNotFound")
        if "someone/gated" in self.path:
            return self._answer(403, X_Error_Code="GatedRepo")
        if "someone/small" not in self.path and "someone/private" not in self.path:
            return self._answer(404, X_Error_Code="RepoNotFound")
        path = self.path.split("?")[0]
        if path.startswith("/api/"):
            if "/revision/" in path and path.rsplit("/", 1)[1] not in ("main", "v1", COMMIT):
                return self._answer(404, X_Error_Code="RevisionNotFound")
            files = sorted(self.folder.iterdir())
            if "/tree/" in path:
                body = [
                    {
                        "type": "file",
                        "path": file.name,
                        "size": file.stat().st_size,
                        "oid": file.name,
                    }
                    for file in files
                ]
                return self._answer(200, json.dumps(body).encode(), Content_Type="application/json")
            body = {
                "_id": "1",
                "id": "someone/small",
                "sha": COMMIT,
                "siblings": [{"rfilename": file.name} for file in files],
                "private": False,
                "tags": [],
                "downloads": 0,
            }
            return self._answer(200, json.dumps(body).encode(), Content_Type="application/json")
        file = self.folder / path.rsplit("/", 1)[1]
        body = file.read_bytes()
        return self._answer(
            200,
            body,
            ETag=f'"{file.name}-{len(body)}"',
            X_Repo_Commit=COMMIT,
            Content_Type="application/octet-stream",
        )


@pytest.fixture
def stub_hub(model_folder):
    handler = type("Handler", (StubHub,), {"folder": model_folder(), "requests": []})
    with served(handler) as endpoint:
        yield handler, endpoint


def plan_from(endpoint, model, tmp_path, *arguments, token=None):
    environment = {
        key: value for key, value in __import__("os").environ.items() if not key.startswith("HF_")
    }
    environment |= {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    } | ({"HF_TOKEN": token} if token else {})
    command = [sys.executable, "-m", "llmq", "plan", model, "--method", "rtn", "--json", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)


def test_hub_model_is_downloaded_with_revision_and_token(stub_hub, tmp_path):
    handler, endpoint = stub_hub
    done = plan_from(endpoint, "someone/private", tmp_path, "--revision", "v1", token="hf_secret")
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["layers"]) == 14
    assert any("/v1" in path for path, _ in handler.requests)
    assert all(
        authorization == "Bearer hf_secret"
        for path, authorization in handler.requests
        if "private" in path
    )


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        ("someone/private", [], "needs HF_TOKEN"),
        ("someone/gated", [], "accept its licence"),
        ("someone/missing", [], "neither a folder here nor a model on the Hub"),
        ("someone/small", ["--revision", "v9"], "no revision 'v9'"),
    ],
)
def test_hub_failures_say_what_to_do(stub_hub, tmp_path, model, arguments, message):
    done = plan_from(stub_hub[1], model, tmp_path, *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("llmq: ")
    assert "Traceback" not in done.stderr


def test_hub_that_cannot_be_reached(tmp_path):
    done = plan_from("http://127.0.0.1:9", "someone/small", tmp_path)
    assert done.returncode == 2
    assert "cannot be reached" in done.stderr or "download failed" in done.stderr


def test_bundled_model_and_folders():
    assert (resolve("tiny") / "model.safetensors").is_file()
    for name, message in (
        ("/nowhere/at/all", "no such folder"),
        ("nothing", "no such folder"),
        (".", "no config.json"),
    ):
        with pytest.raises(LlmqError, match=message):
            resolve(name)


@pytest.mark.parametrize("model_type", FAMILY_CONFIGS)
def test_blocks_and_layers_are_found(model_type):
    model = make_model(model_type)
    prefix, blocks = find_blocks(model)
    layers = quantizable_layers(model)
    assert len(blocks) == 2
    assert all(layer.name.startswith(prefix) for layer in layers)
    linear = {
        name
        for name, module in model.named_modules()
        if type(module).__name__ in ("Linear", "Conv1D", "FalconLinear")
    }
    outside = linear - {layer.name for layer in layers}
    head = model.get_output_embeddings()
    assert all(model.get_submodule(name) is head for name in outside)
    assert needs_bos(model.config) == model_type.startswith("gemma")


def test_meta_model_holds_no_weights_and_real_rotary_tables():
    config = make_model("llama").config
    model = meta_model(config)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert not any(buffer.is_meta for buffer in model.buffers())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "t5"}, "not a causal language model"),
        ({"model_type": "lama"}, r"model type 'lama' is not a causal.*the nearest is llama"),
        ({"model_type": "mistal"}, "the nearest is mistral"),
        (
            {"model_type": "bert", "architectures": ["BertForMaskedLM"]},
            "BertForMaskedLM is not a causal language model",
        ),
        (
            {"model_type": "llama", "architectures": ["LlamaForSequenceClassification"]},
            "LlamaForSequenceClassification is not a causal language model",
        ),
        ({}, "model type None"),
        ([], "not a model config"),
    ],
)
def test_unsupported_architectures_are_refused_from_the_config(config, message, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(LlmqError, match=message):
        load_config(tmp_path)


@pytest.mark.parametrize(
    "settings",
    [
        {"model_type": "llama"},
        {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]},
        {"model_type": "bert", "architectures": ["BertLMHeadModel"]},
    ],
)
def test_architectures_that_predict_the_next_token_pass(settings, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(settings))
    assert load_config(tmp_path).model_type == settings["model_type"]


def test_a_multimodal_model_needs_bos_when_its_text_model_does():
    assert needs_bos(AutoConfig.for_model("gemma3"))
    assert not needs_bos(AutoConfig.for_model("mistral3"))


def edit_config(folder, **settings):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


def test_shapes_that_the_config_does_not_give_are_refused_before_anything_is_written(
    model_folder, tmp_path
):
    folder = model_folder()
    edit_config(folder, intermediate_size=96)
    for read in (
        llmq.load,
        lambda folder: prepare(str(folder), Recipe.uniform("w4g32", method="rtn")),
    ):
        with pytest.raises(
            LlmqError,
            match=r"tensor model\.layers\.0\.mlp\.down_proj\.weight has shape \[64, 128\], "
            r"expected \[64, 96\]",
        ):
            read(folder)
    assert list(tmp_path.iterdir()) == [folder]


def test_stored_tensors_that_the_model_has_no_place_for_are_copied_and_noted(
    model_folder, tmp_path
):
    folder = model_folder()
    path = folder / "model.safetensors"
    extra = {"model.layers.0.mlp.adapter.weight": torch.randn(8, 64).to(torch.float8_e4m3fn)}
    save_file(load_file(path) | extra, path, metadata={"format": "pt"})
    recipe = Recipe.uniform("w4g32", method="rtn")
    job = prepare(str(folder), recipe)
    assert job.notes["source tensors"].startswith("1 of 22 are not used by LlamaForCausalLM")
    assert "first being model.layers.0.mlp.adapter.weight" in job.notes["source tensors"]
    report = quantize_folder(job, tmp_path / "out")
    assert report["copied_source_tensors"] == list(extra)
    assert report["unused_source_tensors"] == []
    copied = load_file(tmp_path / "out" / "model.safetensors")
    assert all(same_bytes(copied[name], tensor) for name, tensor in extra.items())
    with pytest.raises(LlmqError, match=r"--strict: .* 1 of 22 are not used"):
        prepare(str(folder), recipe, strict=True)


def same_bytes(first, second):
    return first.dtype == second.dtype and torch.equal(
        first.view(torch.uint8), second.view(torch.uint8)
    )


@pytest.mark.parametrize("model_type", families("qwen3_5_text"))
def test_every_tensor_of_the_source_is_in_the_result(model_type, model_folder, tmp_path):
    folder = model_folder(model_type)
    quantize_folder(prepare(str(folder), Recipe.uniform("w8", method="rtn")), tmp_path / "out")
    before, after = (ShardReader(path).names for path in (folder, tmp_path / "out"))
    packed = {name.rpartition(".")[0] for name in after}
    assert all(name in after or name.removesuffix(".weight") in packed for name in before)
    assert {name.rpartition(".")[0] for name in before} == packed


@pytest.mark.parametrize("format", ["compressed-tensors", "gptq", "llmq"])
def test_layers_that_the_class_drops_are_copied_and_listed(format, model_folder, tmp_path):
    """A layer behind the last, as GLM stores those of multi-token prediction, and Qwen's `mtp`."""
    folder = model_folder(num_hidden_layers=3)
    edit_config(folder, num_hidden_layers=2)
    path = folder / "model.safetensors"
    extra = {"mtp.fc.weight": torch.randn(64, 128), "mtp.norm.weight": torch.ones(64)}
    save_file(load_file(path) | extra, path, metadata={"format": "pt"})
    before = load_file(path)
    job = prepare(str(folder), Recipe.uniform("w4g32", method="rtn"), format=format, strict=True)
    assert "11 of 32 tensors are of layers" in job.notes["layers beside the model"]
    report = quantize_folder(job, tmp_path / "out")
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert len(report["copied_source_tensors"]) == 11
    assert all(same_bytes(before[name], after[name]) for name in report["copied_source_tensors"])
    packed = {name.rpartition(".")[0] for name in after}
    assert all(name in after or name.removesuffix(".weight") in packed for name in before)
    settings = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    if format == "gptq":
        assert {r"-:mtp\.", r"-:model\.layers\.2\."} <= settings["dynamic"].keys()
    elif format == "compressed-tensors":
        assert {"mtp.fc", "model.layers.2.mlp.up_proj"} <= set(settings["ignore"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = llmq.load(tmp_path / "out", strict=True)
    llmq.save(loaded, tmp_path / "saved", format=format)
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert all(same_bytes(before[name], saved[name]) for name in report["copied_source_tensors"])


@pytest.mark.parametrize(
    ("model_type", "redundant"),
    [
        ("llama", ["lm_head.weight", "model.layers.0.self_attn.rotary_emb.inv_freq"]),
        ("gpt2", ["lm_head.weight", "transformer.h.1.attn.bias", "h.0.attn.masked_bias"]),
    ],
)
def test_tensors_that_say_nothing_new_are_not_noted(model_folder, model_type, redundant):
    folder = model_folder(model_type, tie_word_embeddings=True)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    embeddings = tensors[
        {"llama": "model.embed_tokens.weight", "gpt2": "transformer.wte.weight"}[model_type]
    ]
    save_file(
        {**tensors, **{name: embeddings.clone() for name in redundant}},
        path,
        metadata={"format": "pt"},
    )
    assert prepare(str(folder), Recipe.uniform("w4g32", method="rtn"), strict=True).notes == {}


def test_a_folder_without_tokenizer(tmp_path):
    make_model().save_pretrained(tmp_path / "model")
    with pytest.raises(LlmqError, match=r"copy tokenizer\.json"):
        load_tokenizer(tmp_path / "model")


def test_sharded_and_single_files_read_the_same(model_folder):
    single, sharded = (
        model_folder(name="single"),
        model_folder(name="sharded", max_shard_size="100KB"),
    )
    readers = [ShardReader(folder) for folder in (single, sharded)]
    assert len(set(readers[1].names.values())) > 1
    first, second = (reader.read(reader.names) for reader in readers)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_one_file_comes_before_an_index_as_in_transformers(model_folder):
    folder, other = (
        model_folder(name="sharded", max_shard_size="100KB", seed=1),
        model_folder(name="single", seed=2),
    )
    (other / "model.safetensors").rename(folder / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"
    assert torch.equal(
        ShardReader(folder).read([name])[name],
        AutoModelForCausalLM.from_pretrained(folder).state_dict()[name],
    )


def test_faults_of_the_files_are_named(model_folder):
    folder = model_folder()
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"][3] = float("inf")
    save_file(tensors, path)
    with pytest.raises(
        LlmqError, match=r"tensor model\.norm\.weight holds 1 NaN or infinite values of 64"
    ):
        ShardReader(folder).read(["model.norm.weight"])
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(LlmqError, match=r"model\.safetensors: not a readable safetensors file"):
        ShardReader(folder)
    path.rename(folder / "pytorch_model.bin")
    with pytest.raises(LlmqError, match="pickled weights"):
        ShardReader(folder)


@pytest.mark.parametrize(
    ("file_name", "message"),
    [
        ("../secret.safetensors", "plain names"),
        ("missing.safetensors", "missing"),
        ("x.bin", "plain names"),
    ],
)
def test_index_entries_stay_inside_the_folder(model_folder, file_name, message):
    folder = model_folder(max_shard_size="100KB")
    index = folder / "model.safetensors.index.json"
    data = json.loads(index.read_text())
    data["weight_map"]["model.norm.weight"] = file_name
    index.write_text(json.dumps(data))
    with pytest.raises(LlmqError, match=message):
        ShardReader(folder)


def test_missing_tensors_are_named_and_prefixes_are_optional():
    model = make_model("gpt2")
    names = [
        name.removeprefix("transformer.") for name in model.state_dict() if name != "lm_head.weight"
    ]
    assert (
        match_names(model, names)["transformer.h.0.attn.c_attn.weight"] == "h.0.attn.c_attn.weight"
    )
    with pytest.raises(LlmqError, match=r"lacks 1 of the tensors .* transformer\.ln_f\.bias"):
        match_names(model, [name for name in names if name != "ln_f.bias"])
