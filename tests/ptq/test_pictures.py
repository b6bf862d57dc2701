"""Calibration with pictures beside text: what windows hold, what blocks see, and what becomes of a
multimodal model."""

import hashlib
import json

import pytest
import torch
from picture_models import picture, save_multimodal, without_pictures, write_rows
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

import llmq
from llmq.commands.cli import main
from llmq.errors import LlmqError, LlmqWarning
from llmq.models import compat
from llmq.models.arch import find_blocks, tower_parameters
from llmq.models.readers import CheckpointReader
from llmq.models.source import Source
from llmq.ptq.blocks import Blocks
from llmq.ptq.budget import peak_bytes, work_bytes
from llmq.ptq.capture import BlockRecorder
from llmq.ptq.job import prepare
from llmq.ptq.run import quantize_folder
from llmq.recipe import Recipe

KINDS = ["llava", "gemma3", "qwen2_vl"]
MORE_KINDS = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("llava_next", "qwen3_5")]
SLOW_KINDS = [
    pytest.param(kind, marks=pytest.mark.slow)
    for kind in ("llava", "llava_next", "qwen2_vl", "qwen3_5")
]
LENGTH = 64


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """A function that gives a folder of a kind, made once."""
    made = {}

    def get(kind):
        if kind not in made:
            made[kind] = save_multimodal(tmp_path_factory.mktemp(kind) / "model", kind)
        return made[kind]

    return get


def job_of(folder, rows, *, method="gptq", length=LENGTH, samples=4, seed=0, **settings):
    recipe = Recipe.uniform(
        "w4g32", method=method, samples=samples, sequence_length=length, seed=seed, **settings
    )
    return prepare(str(folder), recipe, calibration=str(rows), held_out=False)


def digests(folder):
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.glob("*.safetensors")
    }


def test_windows_begin_with_pictures_and_go_on_with_text(folder_of, tmp_path):
    rows, folder = write_rows(tmp_path / "data", 3), folder_of("gemma3")
    found = job_of(folder, rows, samples=5).tokens
    told = found.read["pictures"]
    assert told["windows"] == told["pictures"] == 5
    assert (told["rows"], told["left_out"]) == (3, {})
    is_picture = found.pictures.per_token["token_type_ids"].bool()
    soft = Source(folder).config.image_token_index
    assert torch.equal(is_picture, found.tokens == soft)
    assert is_picture.sum(dim=1).tolist() == [4] * 5
    assert (found.tokens[:, 0] == Source(folder).config.get_text_config().bos_token_id).all()
    # the fourth begins as the first does, and goes on otherwise
    end = int(is_picture[0].nonzero().max()) + 1
    assert torch.equal(found.tokens[0, :end], found.tokens[3, :end])
    assert not torch.equal(found.tokens[0], found.tokens[3])
    assert job_of(folder, rows, samples=5).tokens.sha256 == found.sha256
    picture(77).save(tmp_path / "data" / "1.png")
    other = job_of(folder, rows, samples=5).tokens
    assert torch.equal(other.tokens, found.tokens)
    assert other.sha256 != found.sha256


def test_rows_that_are_too_long_are_left_out(folder_of, tmp_path):
    rows, folder = write_rows(tmp_path / "data", 3), folder_of("gemma3")
    long = {"prompt": "go on " * 40, "response": "yes", "images": ["0.png"]}
    rows.write_text(rows.read_text() + json.dumps(long) + "\n")
    told = job_of(folder, rows).tokens.read["pictures"]
    assert told["left_out"] == {"longer than a window": 1}
    assert told["longest_row"] > LENGTH
    with pytest.raises(
        LlmqError, match=r"all 4 rows with pictures are longer .* --sequence-length"
    ):
        job_of(folder, rows, length=16)


@torch.no_grad()
@pytest.mark.parametrize("kind", [*KINDS, *MORE_KINDS])
def test_what_enters_the_first_block_is_what_the_model_has(kind, folder_of, tmp_path):
    folder = folder_of(kind)
    job = job_of(folder, write_rows(tmp_path / "data", 3), samples=2)
    inputs = {"input_ids": job.tokens.tokens, **job.tokens.pictures.of([0, 1])}
    assert inputs.keys() >= {"pixel_values"}
    blocks = Blocks(job.model, CheckpointReader(job.model, job.source.tensors), "cpu")
    with blocks.with_weights_outside(with_towers=True):
        recorder = BlockRecorder(blocks.model, blocks.modules)
        hidden, calls = recorder.run(**inputs)
        without, _ = recorder.run(inputs["input_ids"])
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    seen, outputs = [], []
    own = find_blocks(model)[1]
    own[0].register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((*args, *kwargs.values())[0]), with_kwargs=True
    )
    own[-1].register_forward_hook(lambda _, args, output: outputs.append(output))
    model(**inputs, use_cache=False)
    assert torch.equal(hidden, seen[0])
    assert not torch.equal(hidden, without)
    state = hidden
    for index, call in enumerate(calls):
        state = call.run(blocks.load(index), state)
    last = outputs[0][0] if isinstance(outputs[0], tuple) else outputs[0]
    assert torch.equal(state, last)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["gemma3", *SLOW_KINDS])
def test_a_model_calibrated_with_pictures(kind, folder_of, tmp_path):
    rows, folder = write_rows(tmp_path / "data", 3), folder_of(kind)
    report = quantize_folder(job_of(folder, rows), tmp_path / "out")
    assert report["calibration"]["text"]["pictures"]["pictures"] == 4
    alone = quantize_folder(job_of(folder, without_pictures(rows)), tmp_path / "alone")
    errors = [[layer["error"] for layer in each["layers"]] for each in (report, alone)]
    assert errors[0] != errors[1]
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "out"))
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out").eval()
    towers = [name for name in before if "vision_tower" in name or "visual." in name]
    assert towers
    assert tower_parameters(model)
    assert all(torch.equal(before[name], after[name]) for name in towers)
    assert (
        type(model).__name__ == json.loads((folder / "config.json").read_text())["architectures"][0]
    )
    with compat.without_videos():
        processor = AutoProcessor.from_pretrained(tmp_path / "out")
    content = [{"type": "image"}, {"type": "text", "text": "What?"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}])
    inputs = processor(text=[text], images=[[picture(5)]], return_tensors="pt")
    n_before = inputs["input_ids"].shape[1]
    assert model.generate(**inputs, max_new_tokens=3).shape[1] > n_before
    assert llmq.load(tmp_path / "out", strict=True) is not None


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gemma3", *SLOW_KINDS])
def test_an_interrupted_run_goes_on_with_the_same_bytes(kind, folder_of, tmp_path):
    rows, folder = write_rows(tmp_path / "data", 2), folder_of(kind)
    quantize_folder(job_of(folder, rows), tmp_path / "whole")

    def stop(report):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_folder(job_of(folder, rows), tmp_path / "out", on_block=stop)
    report = quantize_folder(job_of(folder, rows), tmp_path / "out")
    assert report["resumed_at_block"] == 1
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def test_pictures_that_change_during_a_run_are_noticed(folder_of, tmp_path):
    job = job_of(folder_of("gemma3"), write_rows(tmp_path / "data", 2))
    picture(9).save(tmp_path / "data" / "0.png")
    with pytest.raises(LlmqError, match=r"row 0: its pictures are not what they were"):
        job.tokens.pictures.of(range(4))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "settings",
    [
        {"inputs": "full-precision"},
        {"method": "blockwise", "iterations": 2},
        {"embeddings": "w8"},
    ],
)
def test_every_method_takes_pictures(kind, settings, folder_of, tmp_path):
    settings = {
        key: llmq.QuantSpec.parse(value) if key == "embeddings" else value
        for key, value in settings.items()
    }
    job = job_of(folder_of(kind), write_rows(tmp_path / "data", 3), **settings)
    report = quantize_folder(job, tmp_path / "out")
    assert report["verified_blocks"] == 2
    assert not report["layers_with_large_error"]


def test_with_pictures_methods_go_without_gradients_of_the_model(folder_of, tmp_path):
    """What is theirs by default; what was asked for is refused."""
    rows, folder = write_rows(tmp_path / "data", 2), folder_of("gemma3")
    job = job_of(folder, rows, method="blockwise")
    assert (job.recipe.token_weights, job.recipe.scale_steps) == ("equal", 0)
    assert "goes without scale steps and token weights" in job.remarks["gradients"]
    with pytest.raises(LlmqError, match=r"7 scale steps .* the calibration file has pictures"):
        job_of(folder, rows, method="blockwise", scale_steps=7)
    alone = job_of(folder, without_pictures(rows), method="blockwise")
    assert (alone.recipe.token_weights, alone.recipe.scale_steps) == ("fisher", 36)
    assert "gradients" not in alone.remarks


def test_blocks_that_see_pictures_on_their_way_are_refused(folder_of, tmp_path, capsys):
    """By plan and quantize before anything runs, and by doctor, in the same words."""
    rows, folder = write_rows(tmp_path / "data", 2), folder_of("qwen3_vl")
    with pytest.raises(LlmqError, match=r"deepstack_visual_indexes.*; calibrate on the text alone"):
        job_of(folder, rows)
    assert main(["plan", str(folder), "--calibration", str(rows)]) == 2
    told = capsys.readouterr().err
    assert main(["doctor", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["notes"]["pictures"] in told
    quantize_folder(job_of(folder, without_pictures(rows)), tmp_path / "alone")


def test_such_blocks_are_noticed_without_a_config_that_says_so(folder_of, tmp_path, monkeypatch):
    monkeypatch.setattr("llmq.ptq.calibration.refusal_of_pictures", lambda model: None)
    job = job_of(folder_of("qwen3_vl"), write_rows(tmp_path / "data", 2))
    with pytest.raises(LlmqError, match=r"with pictures: block 1 .*; calibrate on the text alone"):
        quantize_folder(job, tmp_path / "out")


def test_a_folder_without_a_processor(tmp_path):
    folder = save_multimodal(tmp_path / "model", "llava")
    rows = write_rows(tmp_path / "data", 2)
    for name in ("preprocessor_config.json", "processor_config.json"):
        (folder / name).unlink()
    message = r"has no preprocessor_config\.json.*on the text alone: .*rows\.jsonl#prompt"
    with pytest.raises(LlmqError, match=message):
        job_of(folder, rows)
    assert job_of(folder, f"{rows}#prompt", length=8).tokens.pictures is None


def test_a_model_of_text_leaves_pictures_aside(model_folder, tmp_path):
    rows = write_rows(tmp_path / "data", 2)
    with pytest.warns(LlmqWarning, match="2 pictures are left aside"):
        job = job_of(model_folder(), rows)
    assert job.tokens.pictures is None
    assert job.tokens.read["pictures_in_rows"] == 2


def test_towers_are_planned_where_they_are_read(folder_of, tmp_path):
    rows, folder = write_rows(tmp_path / "data", 2), folder_of("gemma3")
    jobs = [job_of(folder, name) for name in (rows, without_pictures(rows))]
    assert work_bytes(jobs[0]) > work_bytes(jobs[1])
    assert peak_bytes(jobs[0]) >= peak_bytes(jobs[1])
