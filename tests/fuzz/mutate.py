"""Mutations of model folders, recipes and texts: what a download that broke, an editor, an old tool
or somebody hostile makes of them. All from one seeded generator."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

HOSTILE_TEXT = "\x1b[31mred\x1b[0m\u202egnp\r\n\x00\x07"
_KEYS = """_attn_implementation activations architectures attention_bias attention_dropout auto_map
bos_token_id cache_implementation chat_template chunk_size_feed_forward dtype do_sample
eos_token_id final_logit_softcapping forced_bos_token_id head_dim hidden_act hidden_size id2label
initializer_range intermediate_size is_decoder kv_bits layer_types max_length
max_position_embeddings max_time min_length model_type n_embd n_head n_inner n_layer n_positions
num_attention_heads num_beams num_experts num_hidden_layers num_key_value_heads num_labels
num_return_sequences pad_token_id penalty_alpha problem_type pruned_heads quantization_config
query_pre_attn_scalar repetition_penalty rms_norm_eps rope_parameters rope_scaling rope_theta
sliding_window sub_configs suppress_tokens temperature text_config tie_word_embeddings
tokenizer_class top_k top_p torch_dtype transformers_version use_cache vocab_size bits group_size
sym desc_act format checkpoint_format dynamic exceptions spec version modules_to_not_convert
linear_class quantization_mode config_groups targets weights input_activations num_bits strategy
block_structure ignore kv_cache_scheme quantization_status layout
model normalizer pre_tokenizer post_processor decoder added_tokens
truncation padding vocab merges unk_token byte_fallback extra_special_tokens bos_token eos_token
model_max_length model_input_names added_tokens_decoder special_tokens add_prefix_space
continuing_subword_prefix clean_up_tokenization_spaces processor_class backend rules method samples
damping weight_map metadata"""
_WORDS = """llama gpt2 gemma3_text qwen2 mamba t5 mixtral bert llava gptq gptq_v2 llmq bitnet awq
compressed-tensors int4 int8 ternary float16 bfloat16 int8-static int8-token offline online
LlamaTokenizer GPT2Tokenizer PreTrainedTokenizerFast BertTokenizer LlamaForCausalLM
LlamaForSequenceClassification silu gelu relu2 sdpa eager flash_attention_2 default linear dynamic
yarn longrope llama3 full_attention sliding_attention static quantized offloaded BPE WordPiece
Unigram WordLevel ByteLevel Metaspace Split Sequence Replace TemplateProcessing Isolated"""
KEYS, WORDS = _KEYS.split(), _WORDS.split()
PATTERNS = [
    "(a+)+$",
    "(a|aa)+$",
    "(((a{1000}){1000}){1000})",
    "(",
    "[",
    "\\",
    "(?<=a+)b",
    ".*" * 50,
]
NUMBERS = [0, 1, 2, 3, 7, 32, 64, -1, -5, 1000, 10**6, 2**31, 2**40, 2**63, 10**18, 10**400]
FLOATS = [0.5, -0.5, 32.0, 1e-30, 1e30, 1e308, float("nan"), float("inf"), float("-inf")]


def nested(depth: int, kind: str = "[") -> Any:
    """A container inside a container, `depth` times."""
    value: Any = 1
    for _ in range(depth):
        value = [value] if kind == "[" else {"a": value}
    return value


def any_value(random: Random) -> Any:
    """A JSON value of any type, mostly one that does not fit."""
    make: list[Callable[[], Any]] = [
        lambda: None,
        lambda: random.choice([True, False]),
        lambda: random.choice(NUMBERS),
        lambda: random.choice(FLOATS),
        lambda: random.choice(WORDS),
        lambda: random.choice(PATTERNS),
        lambda: random.choice(
            ["", "x", HOSTILE_TEXT, "../../x", "/etc/passwd", "\ud800", "y" * 5000]
        ),
        lambda: random.choice([[], [1], ["a"], [None], [[]], [0] * 1000]),
        lambda: random.choice([{}, {"a": 1}, {"0": {}}, {"rope_type": "yarn", "factor": -1}]),
        lambda: {random.choice(KEYS): random.choice([*NUMBERS, *WORDS, None, [], {}])},
        lambda: nested(random.choice([3, 60, 80, 400]), random.choice("[{")),
    ]
    return random.choice(make)()


def alike(random: Random, value: Any) -> Any:
    """Another value of the same type, which passes where types are all that is checked."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return random.choice(
            [value + 1, value - 1, value * 2, value // 2, 0, 1, 2, 3, 64, 1000, -1]
        )
    if isinstance(value, float):
        return random.choice([value * 2, -value, 0.0, 1.0, 1e-30, *FLOATS])
    if isinstance(value, str):
        return random.choice([*WORDS, value + "x", value.upper(), value[:-1], ""])
    if isinstance(value, list):
        return [alike(random, item) if random.random() < 0.3 else item for item in value]
    if isinstance(value, dict):
        return {
            key: alike(random, part) if random.random() < 0.3 else part
            for key, part in value.items()
        }
    return random.choice([0, 1, 16, "llama", True, 1.5, [0], {}])


def places(value: Any) -> list[tuple[Any, Any]]:
    """(container, key) of every value inside, the outermost excepted."""
    found: list[tuple[Any, Any]] = []
    waiting = [value]
    while waiting and len(found) < 5000:
        container = waiting.pop()
        keys = list(container) if isinstance(container, dict) else range(len(container))
        for key in keys:
            found.append((container, key))
            if isinstance(container[key], dict | list):
                waiting.append(container[key])
    return found


def mutate_value(random: Random, data: Any) -> Any:
    """A JSON value with one thing changed."""
    found = places(data)
    if not found or random.random() < 0.03:
        return any_value(random)
    shallow = [place for place in found if place[0] is data]
    container, key = random.choice(shallow if random.random() < 0.5 and shallow else found)
    value = container[key]
    step = random.randrange(16)
    if step >= 8:
        container[key] = alike(random, value)
    elif step == 0:
        del container[key]
    elif step == 1 and isinstance(container, dict):
        container[random.choice([HOSTILE_TEXT, "", "x", *KEYS])] = container.pop(key)
    elif step == 2 and isinstance(container, dict):
        container[random.choice(KEYS)] = any_value(random)
    elif step == 3 and type(value) in (int, float):
        container[key] = random.choice([-value, value * 10, value + 1, str(value), value / 2])
    elif step == 4:
        container[key] = random.choice([[value], {"a": value}, str(value)])
    elif step == 5 and isinstance(value, list):
        container[key] = random.choice([value[:1], value * 2, value[::-1], [*value, None]])
    elif step == 6:
        other = random.choice(found)
        if key in other[0] if isinstance(other[0], dict) else key != other[1]:
            container[key] = json.loads(json.dumps(other[0][other[1]]))
    else:
        container[key] = any_value(random)
    return data


def dump(random: Random, data: Any) -> bytes:
    """JSON text, now and then with what a parser may not like."""
    text = json.dumps(data)
    step = random.randrange(40)
    if step == 0:
        text = "[" * 100_000 + text
    elif step == 1 and text.startswith("{"):
        key = random.choice(list(data) or ["a"])
        text = f"{{{json.dumps(key)}: {json.dumps(any_value(random))}, " + text[1:]
    elif step == 2:
        text = text + random.choice([text, "}", "\x00", "//", "\n\n{}"])
    elif step == 3:
        return text.encode(random.choice(["utf-16", "utf-8-sig"]))
    return text.encode("utf-8", "surrogatepass")


def mutate_json(random: Random, path: Path) -> None:
    """Change a JSON file in one to three places."""
    try:
        data = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return mutate_bytes(random, path)
    for _ in range(random.choice([1, 1, 1, 2, 3])):
        if isinstance(data, dict | list):
            data = mutate_value(random, data)
    path.write_bytes(dump(random, data))
    return None


def mutate_bytes(random: Random, path: Path) -> None:
    """Cut a file, flip or put bytes into it, or give it other contents."""
    data = bytearray(path.read_bytes())
    step = random.randrange(7)
    if step == 0:
        data = data[: random.randrange(len(data) + 1)]
    elif step == 1:
        data = bytearray()
    elif step == 2:
        data = bytearray(random.randbytes(random.choice([1, 8, 1000])))
    elif step == 3:
        position = random.randrange(len(data) + 1)
        data[position:position] = random.choice([b"\x00", b"\xff\xfe", b"\n\n", b"{", b'"'])
    elif step == 4:
        data += random.randbytes(random.choice([1, 100]))
    elif data:
        for _ in range(random.choice([1, 1, 4, 64])):
            data[random.randrange(len(data))] ^= 1 << random.randrange(8)
    path.write_bytes(bytes(data))


def mutate_tensors(random: Random, path: Path) -> None:
    """Change the header or the data of a safetensors file, which stays well formed mostly."""
    raw = path.read_bytes()
    n_header = int.from_bytes(raw[:8], "little")
    try:
        header, data = json.loads(raw[8 : 8 + n_header]), bytearray(raw[8 + n_header :])
    except ValueError:
        return mutate_bytes(random, path)
    names = [name for name in header if name != "__metadata__"]
    if not names:
        return mutate_bytes(random, path)
    name = random.choice(names)
    entry = header[name]
    step = random.randrange(12)
    if step == 0:
        entry["dtype"] = random.choice(["F64", "I64", "U8", "BOOL", "F8_E4M3", "I8", "X", 3, None])
    elif step == 1:
        entry["shape"] = random.choice([[], [0], [-1], [2**40, 2**40], entry["shape"][::-1], "x"])
    elif step == 2:
        entry["data_offsets"] = random.choice([[0, 0], [5, 3], [0, 2**63], [-1, 4], [0], None])
    elif step == 3:
        del header[name]
    elif step == 4:
        header[random.choice([HOSTILE_TEXT, "a" * 3000, "", "model.x", name + ".weight"])] = entry
    elif step == 5:
        other = header[random.choice(names)]
        entry["data_offsets"], other["data_offsets"] = other["data_offsets"], entry["data_offsets"]
    elif step == 6:
        header = mutate_value(random, header)
    elif step == 7:
        _fill(entry, data, random.choice([b"\x00", b"\xff", b"\x7f", b"\x80"]))
    elif step == 8:
        return _write(path, header, data, random.choice([0, 1, 2**62, 100, 10**8 + 1]))
    elif step == 9:
        other = random.choice(names)
        header[name], header[other] = header[other], entry
    elif step == 10:
        names_now = list(header)
        random.shuffle(names_now)
        renamed = {a: header[b] for a, b in zip(header, names_now, strict=True)}
        header = renamed if random.random() < 0.5 else header
    elif data:
        for _ in range(random.choice([1, 16, 256])):
            data[random.randrange(len(data))] ^= 1 << random.randrange(8)
    return _write(path, header, data)


def _fill(entry: dict[str, Any], data: bytearray, byte: bytes) -> None:
    begin, end = entry["data_offsets"]
    data[begin:end] = byte * (end - begin)


def _write(path: Path, header: Any, data: bytearray, n_header: int | None = None) -> None:
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    text += b" " * (-len(text) % 8)
    length = len(text) if n_header is None else n_header
    path.write_bytes(length.to_bytes(8, "little") + text + bytes(data))


def mutate_entry(random: Random, folder: Path, path: Path) -> None:
    """Take a file away, or put something else in its place or beside it."""
    step = random.randrange(10)
    others = [other for other in sorted(folder.iterdir()) if other.is_file() and other != path]
    if step == 0 and others:
        content = random.choice(others).read_bytes()
        path.write_bytes(content)
        return
    if step == 1:
        path.rename(path.with_name(random.choice(["other", path.name + ".bak", "model.bin", "-x"])))
        return
    if step == 2 and others:
        shutil.copyfile(path, folder / f"extra-{path.name}")
        return
    path.unlink()
    if step == 3:
        path.mkdir()
    elif step == 4:
        os.mkfifo(path)
    elif step == 5:
        path.symlink_to(
            random.choice(["/dev/zero", "/dev/null", "/etc/passwd", "nowhere", path.name])
        )


def mutate_folder(random: Random, folder: Path) -> None:
    """Change a model folder in one to three places."""
    # An earlier mutation may have left nothing to change in the way of the next.
    with contextlib.suppress(ArithmeticError, LookupError, AttributeError, TypeError, ValueError):
        _mutate_places(random, folder)


def _mutate_places(random: Random, folder: Path) -> None:
    for _ in range(random.choice([1, 1, 1, 2, 3])):
        files = [p for p in sorted(folder.iterdir()) if p.is_file() and not p.is_symlink()]
        if not files:
            return
        json_files = [p for p in files if p.suffix == ".json"]
        tensors = [p for p in files if p.suffix == ".safetensors"]
        likely = [p for p in json_files if p.name != "report.json"]
        step = random.random()
        if step < 0.55 and likely:
            path = random.choice(likely)
            mutate_json(random, folder / "config.json" if _is_half(random, folder) else path)
        elif step < 0.6 and json_files:
            mutate_json(random, random.choice(json_files))
        elif step < 0.8 and tensors:
            mutate_tensors(random, random.choice(tensors))
        elif step < 0.9:
            mutate_bytes(random, random.choice(files))
        else:
            mutate_entry(random, folder, random.choice(files))


def _is_half(random: Random, folder: Path) -> bool:
    path = folder / "config.json"
    return random.random() < 0.4 and path.is_file() and not path.is_symlink()


def mutate_text(random: Random, path: Path) -> None:
    """Change a text file or a file of rows."""
    step = random.randrange(8)
    if path.suffix in (".jsonl", ".json") and step < 4:
        rows: list[Any] = [b'{"text": "a"}\n', b"[" * 100_000 + b"\n", b"\n", b'{"a":' * 100_000]
        rows += [b'{"text": "\\ud800"}\n', b'{"text": 3}\n', b"null\n", b'{"text": "\xff"}\n']
        rows += [dump(random, {"text": any_value(random)}) + b"\n"]
        path.write_bytes(b"".join(random.choice(rows) for _ in range(random.choice([1, 1, 5]))))
    elif step == 4:
        path.write_text(HOSTILE_TEXT * random.choice([1, 100]), encoding="utf-8")
    elif step == 5:
        path.unlink()
        os.mkfifo(path) if random.random() < 0.5 else path.mkdir()
    else:
        mutate_bytes(random, path)
