"""Models as GGUF files and back: the same values, the same logits, the same tokens; and what is
refused."""

import random

import pytest
import torch

import llmq
from llmq.commands.cli import main
from llmq.errors import LlmqError
from llmq.formats.gguf.container import GgufFile
from llmq.formats.gguf.export import export_gguf
from llmq.inference.module import quantized_modules
from llmq.models.source import Source

TEXT = "def f(x):\n    return x + 12345  # don't  ask\n\n\t\u00fcber \u65e5\u672c \U0001f600"
# What llama.cpp computes of each family, where the usual small model differs.
OVERRIDES = {
    "mistral": {"sliding_window": None},
    "qwen2": {"layer_types": None, "use_sliding_window": False, "sliding_window": None},
    "gemma2": {"query_pre_attn_scalar": 32},
    "gemma3_text": {"query_pre_attn_scalar": 32},
}
FAMILIES = [
    name if name in ("llama", "gemma3_text") else pytest.param(name, marks=pytest.mark.slow)
    for name in ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text")
]


@pytest.fixture
def small(model_folder):
    """A function that saves a small model of a family, with norms that are not all the same."""

    def make(model_type="llama", **overrides):
        folder = model_folder(model_type, **{**OVERRIDES.get(model_type, {}), **overrides})
        model = llmq.load(folder, dtype="float32")
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.data += torch.randn_like(parameter) * 0.1
        model.save_pretrained(folder)
        return folder

    return make


def exported(folder, path, **options):
    return export_gguf(Source.open(folder), path, **options)


def logits(model):
    with torch.no_grad():
        return model(torch.arange(5, 60)[None]).logits


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_model_in_full_precision_comes_back(small, tmp_path, model_type):
    folder, path = small(model_type), tmp_path / "model.gguf"
    report = exported(folder, path)
    assert report.types.keys() == {"F32"}
    assert (report.layers, report.stored_bytes) == ((), path.stat().st_size)
    before, after = llmq.load(folder), llmq.load(path)
    assert torch.equal(logits(before), logits(after))
    assert after.config.model_type == ("llama" if model_type == "mistral" else model_type)


def packed(folder, out, *options):
    command = ["quantize", str(folder), str(out), "--method", "rtn", *options]
    assert main(command) == 0
    return out


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        (["--bits", "4", "--group-size", "32"], "Q4_0"),
        pytest.param(["--bits", "8"], "Q8_0", marks=pytest.mark.slow),
        pytest.param(["--bits", "2", "--group-size", "64"], "Q2_0", marks=pytest.mark.slow),
        pytest.param(["--bits", "ternary", "--group-size", "64"], "Q2_0", marks=pytest.mark.slow),
    ],
)
def test_packed_layers_come_back_on_the_kernels(small, tmp_path, options, kind):
    folder, path = packed(small(), tmp_path / "packed", *options), tmp_path / "model.gguf"
    report = exported(folder, path)
    assert report.is_exact
    assert [layer.after for layer in report.layers] == [kind] * 14
    assert report.types[kind] == 14
    assert [each.engine for each in report.engines if each.reads] == ["llmq", "llama.cpp"]
    before, after = (quantized_modules(llmq.load(each)) for each in (folder, path))
    assert before.keys() == after.keys()
    for name, module in before.items():
        first, second = module.qtensor(), after[name].qtensor()
        assert torch.equal(first.dequantize(), second.dequantize())
        assert first.spec == second.spec or kind == "Q2_0"


def test_the_tokenizer_and_the_chat_template_come_along(small, tmp_path, tokenizer):
    folder, path = small(), tmp_path / "model.gguf"
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    tokenizer.save_pretrained(folder)
    tokenizer.chat_template = None
    exported(folder, path)
    before, after = Source.open(folder).tokenizer, Source.open(path).tokenizer
    assert after(TEXT)["input_ids"] == before(TEXT)["input_ids"]
    assert after.decode(after(TEXT)["input_ids"]) == TEXT
    assert after.chat_template == before.chat_template
    assert after.get_vocab() == before.get_vocab()
    assert after.eos_token_id == before.eos_token_id


def test_the_positions_of_llama_3_1_come_back(small, tmp_path):
    rotations = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    folder, path = small(rope_parameters=rotations), tmp_path / "model.gguf"
    exported(folder, path)
    before, after = llmq.load(folder), llmq.load(path)
    assert after.config.rope_parameters == rotations
    assert torch.equal(logits(before), logits(after))


@pytest.mark.parametrize(
    "model_type", ["llama", pytest.param("gemma3_text", marks=pytest.mark.slow)]
)
def test_transformers_computes_the_same_from_the_file(small, tmp_path, model_type):
    pytest.importorskip("gguf", reason="transformers needs the package gguf to read such files")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # It takes Gemma's usual pattern of windows and scale of queries, whatever the file says.
    usual = {"layer_types": None, "head_dim": 256, "query_pre_attn_scalar": 256}
    overrides = usual if model_type == "gemma3_text" else {}
    folder, path = small(model_type, **overrides), tmp_path / "model.gguf"
    exported(folder, path)
    names = {"pretrained_model_name_or_path": tmp_path, "gguf_file": path.name}
    model = AutoModelForCausalLM.from_pretrained(**names, dtype=torch.float32)
    assert torch.equal(logits(model), logits(llmq.load(folder)))
    tokenizer = AutoTokenizer.from_pretrained(**names)
    assert tokenizer(TEXT)["input_ids"] == Source.open(folder).tokenizer(TEXT)["input_ids"]


def test_zero_points_are_refused_or_rounded_and_counted(small, tmp_path):
    options = ("--bits", "4", "--group-size", "32", "--asymmetric", "--format", "llmq")
    folder, path = packed(small(), tmp_path / "packed", *options), tmp_path / "model.gguf"
    with pytest.raises(LlmqError, match=r"14 of 14 packed layers .* products -s z .*--allow-requ"):
        exported(folder, path)
    assert not path.exists()
    report = exported(folder, path, allow_requantize=True)
    assert len(report.requantized) == len(report.layers) == 14
    assert all("products -s z" in layer.reason for layer in report.layers)
    assert all(0 < layer.max_error < 1e-3 for layer in report.layers)
    assert all(0 < layer.error < 1e-3 for layer in report.layers)
    with pytest.warns(llmq.errors.LlmqWarning, match="14 packed tensors run as bfloat16"):
        llmq.load(path)


@pytest.mark.parametrize(
    ("model_type", "overrides", "expected"),
    [
        ("phi3", {}, "models of type 'phi3' are not written"),
        ("mistral", {"sliding_window": 16}, "without a sliding window"),
        ("llama", {"hidden_act": "gelu"}, "the activation silu, not 'gelu'"),
        ("gemma3_text", {"query_pre_attn_scalar": 64}, "query_pre_attn_scalar 32"),
        ("qwen3", {"attention_bias": True}, "no place in llama.cpp's qwen3"),
    ],
)
def test_what_llama_cpp_does_not_compute_is_refused(
    model_folder, tmp_path, model_type, overrides, expected
):
    folder = model_folder(model_type, **overrides)
    with pytest.raises(LlmqError, match=expected):
        exported(folder, tmp_path / "model.gguf")
    assert not (tmp_path / "model.gguf").exists()


def test_an_output_that_exists_is_left_alone(small, tmp_path):
    path = tmp_path / "model.gguf"
    path.write_text("mine")
    with pytest.raises(LlmqError, match="exists already"):
        exported(small(), path)
    assert path.read_text() == "mine"


def test_another_file_of_the_same_name_is_unpacked_anew(small, tmp_path):
    path = tmp_path / "model.gguf"
    exported(small(), path)
    first = logits(llmq.load(path))
    path.unlink()
    exported(small(seed=1), path)
    assert not torch.equal(first, logits(llmq.load(path)))


def test_a_damaged_file_is_an_error_and_never_a_crash(small, tmp_path):
    path = tmp_path / "model.gguf"
    exported(packed(small(), tmp_path / "packed", "--group-size", "32"), path)
    content = path.read_bytes()
    tensors = GgufFile(path).tensors
    header = min(each.start for each in tensors.values())
    # What is said of the model, and of the tensors; tokens and merges lie between.
    fields = content.index(b"tokenizer.ggml.tokens")
    places = [*range(fields), *range(content.index(b"token_embd.weight"), header)]
    chance, n_refused = random.Random(0), 0
    for _ in range(40):
        damaged = bytearray(content)
        damaged[chance.choice(places)] ^= 1 << chance.randrange(8)
        path.write_bytes(damaged)
        try:
            assert Source.open(path).config
        except LlmqError:
            n_refused += 1
    assert n_refused > 10


def test_scales_that_are_no_numbers_are_refused(small, tmp_path):
    path = tmp_path / "model.gguf"
    exported(packed(small(), tmp_path / "packed", "--group-size", "32"), path)
    content = bytearray(path.read_bytes())
    start = GgufFile(path).tensors["blk.0.ffn_up.weight"].start
    content[start : start + 2] = b"\x00\x7e"  # NaN
    path.write_bytes(content)
    with pytest.raises(LlmqError, match=r"blk.0.ffn_up.weight.*NaN"):
        llmq.load(path)
