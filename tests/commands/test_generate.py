"""`llmq generate` gives the text of transformers' own `generate`, whatever the folder says of
generation, and of which file."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from llmq.commands.cli import main

TEXT = "def main(argv):\n    parser ="
NEW = 16
SAYS = {
    "no cache": {"use_cache": False},
    "static": {"cache_implementation": "static"},
    "dynamic": {"cache_implementation": "dynamic"},
    "beams": {"num_beams": 3},
    "several beams": {"num_beams": 4, "num_return_sequences": 2},
    "stop": {"stop_strings": "STOP"},
    "dictionary": {
        "return_dict_in_generate": True,
        "output_scores": True,
        "output_attentions": True,
        "output_hidden_states": True,
    },
    "lookup": {"prompt_lookup_num_tokens": 2},
    "sampling": {"do_sample": True, "temperature": 0.3, "top_k": 3},
    "ends": {"eos_token_id": [0, 5, 6]},
    "no ids": {"eos_token_id": None, "bos_token_id": None, "num_beams": 2},
}
SHOWN = {"no cache", "static", "several beams", "stop", "dictionary"}


@pytest.fixture
def llmq(capsys):
    """A function that runs `llmq generate` and returns (exit code, stdout, stderr)."""

    def run(folder, *arguments):
        capsys.readouterr()
        code = main(["generate", str(folder), "--prompt", TEXT, *map(str, arguments)])
        return code, *capsys.readouterr()

    return run


def say(folder, says, file="generation_config.json"):
    """Have a folder say something of generation, in the one file or in the other alone."""
    path = folder / file
    if file == "config.json":
        (folder / "generation_config.json").unlink()
    ids = {"bos_token_id": 0, "eos_token_id": 0}
    before = json.loads(path.read_text()) if file == "config.json" else ids
    path.write_text(json.dumps({**before, **says}))


def transformers_own(folder, tokenizer, **options):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prompt = tokenizer(TEXT, return_tensors="pt")
    options = {"max_new_tokens": NEW, "do_sample": False, "tokenizer": tokenizer, **options}
    output = model.generate(**prompt, **options)
    ids = output if isinstance(output, torch.Tensor) else output.sequences
    return ids[:, prompt["input_ids"].shape[1] :], tokenizer.batch_decode(
        ids, skip_special_tokens=True
    )


@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
@pytest.mark.parametrize("family", ["llama", pytest.param("gemma3_text", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "label",
    [name if name in SHOWN else pytest.param(name, marks=pytest.mark.slow) for name in SAYS],
)
def test_the_text_is_transformers_own(label, family, file, llmq, model_folder, tokenizer):
    folder, says = model_folder(family), dict(SAYS[label])
    if label == "stop":
        tokens, _ = transformers_own(folder, tokenizer)
        says["stop_strings"] = tokenizer.decode(tokens[0, 4])
    say(folder, says, file)
    ids, texts = transformers_own(folder, tokenizer)
    code, stdout, stderr = llmq(folder, "--max-new-tokens", NEW, "--json")
    assert code == 0, stderr
    result = json.loads(stdout)
    written = [text.removeprefix(TEXT) for text in texts]
    assert (result["text"], result["texts"]) == (written[0], written)
    ends = set(says["eos_token_id"] or []) if "eos_token_id" in says else {0}
    row = ids[0].tolist()
    n_new = next((i + 1 for i, token in enumerate(row) if token in ends), len(row))
    assert result["new_tokens"] == n_new
    if label == "stop":
        assert n_new < NEW


def test_several_texts_are_printed_and_one_is_streamed(llmq, model_folder, tokenizer):
    folder = model_folder()
    say(folder, {"num_beams": 3, "num_return_sequences": 3})
    _, texts = transformers_own(folder, tokenizer)
    code, stdout, _ = llmq(folder, "--max-new-tokens", NEW)
    assert (code, stdout) == (0, "\n".join([*texts, ""]))  # without a chat template: all of it
    say(folder, {"return_dict_in_generate": True})
    _, texts = transformers_own(folder, tokenizer)
    code, stdout, _ = llmq(folder, "--max-new-tokens", NEW)
    assert (code, stdout) == (0, texts[0] + "\n")


def test_rows_that_end_early_are_not_counted_to_their_padding(llmq, model_folder, tokenizer):
    folder = model_folder()
    tokens, _ = transformers_own(folder, tokenizer)
    say(folder, {"num_return_sequences": 4, "eos_token_id": [int(t) for t in tokens[0, 2:5]]})
    folder_says = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps({**folder_says, "do_sample": True}))
    code, stdout, stderr = llmq(folder, "--max-new-tokens", NEW, "--temperature", 0.05, "--json")
    result = json.loads(stdout)
    assert code == 0, stderr
    assert len(result["texts"]) == 4
    assert 0 < result["new_tokens"] <= 5


def test_how_many_tokens_the_folder_says(llmq, model_folder, tokenizer):
    folder = model_folder()
    n_prompt = len(tokenizer(TEXT)["input_ids"])
    for says, expected in (
        ({"max_new_tokens": 5}, 5),
        ({"max_length": n_prompt + 7}, 7),
        ({"max_length": 4096}, 64),
        ({}, 64),
    ):
        say(folder, {"eos_token_id": None, **says})
        code, stdout, stderr = llmq(folder, "--json")
        assert code == 0, stderr
        assert json.loads(stdout)["new_tokens"] == expected
        assert json.loads(llmq(folder, "--json", "--max-new-tokens", 3)[1])["new_tokens"] == 3
    say(folder, {"max_length": n_prompt})
    code, _, stderr = llmq(folder)
    assert (code, stderr.count("\n")) == (2, 1)
    assert f"has max_length {n_prompt}" in stderr


@pytest.mark.parametrize(
    ("says", "name"),
    [
        ({"penalty_alpha": 0.6, "top_k": 4}, "penalty_alpha"),
        ({"cache_implementation": "quantized"}, "cache_implementation 'quantized'"),
        ({"cache_implementation": "offloaded"}, "cache_implementation 'offloaded'"),
        ({"num_return_sequences": 2, "do_sample": True}, "num_return_sequences 2"),
        ({"num_return_sequences": 2}, "num_return_sequences"),
        ({"num_beams": "four"}, "num_beams"),
        ({"use_cache": "no"}, "use_cache"),
        ({"repetition_penalty": -2.0}, "repetition_penalty"),
        ({"forced_eos_token_id": 10**9}, "forced_eos_token_id"),
        ({"bad_words_ids": [[10**9]]}, "bad_words_ids"),
        ({"sequence_bias": [["x", 1.0]]}, "sequence_bias"),
        ({"prompt_lookup_num_tokens": 2, "assistant_ensemble_weight": 0.5}, "assistant_ensemble"),
        ({"num_beams": 2, "early_stopping": "soon"}, "early_stopping"),
    ],
)
def test_what_cannot_work_is_named_in_one_line(says, name, llmq, model_folder):
    folder = model_folder()
    say(folder, says)
    code, _, stderr = llmq(folder, "--max-new-tokens", 4)
    said = [line for line in stderr.splitlines() if line.startswith("llmq: ")]
    assert (code, len(said), "Traceback" in stderr) == (2, 1, False), stderr
    assert name in said[0]
    assert len(said[0]) < 400
