"""Decoding a whole model on a CPU: transformers in bfloat16, llmq, and llama.cpp on the same
shapes, in one run.

    python scripts/benchmark_decode.py --threads 2
    python scripts/benchmark_decode.py --threads 2 --llama-python OTHER_ENV/bin/python   # where
    llama-cpp-python is installed

A Llama of 0.85B parameters with random weights (16 layers, 2048 wide, MLP 5632, vocabulary 32000):
what the numbers are does not matter for speed. Each engine runs in a process of its own, they take
turns, and the table shows medians: tokens per second of decoding after a prompt of 128 tokens,
prompt tokens per second, and resident memory beyond the libraries against the bytes of the weights.
llama.cpp gets Q4_0 with its usual Q6_K head, as written here with the gguf package (`pip install
'.[gguf]'`)."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SHAPE = {
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 2048,
}
PROMPT = 128
# name -> compute mode and bits of the head; None for a model that is not quantized
ENGINES: dict[str, tuple[str, int | None] | None] = {
    "bfloat16": None,
    "llmq, exact": ("exact", None),
    "llmq, exact, 8-bit head": ("exact", 8),
    "llmq, int8, 8-bit head": ("int8", 8),
}
LLAMA = "llama.cpp Q4_0"
# Run by the other interpreter, which has llama-cpp-python and need not have anything else.
LLAMA_CODE = """
import json, sys, time
from llama_cpp import Llama
path, n_threads, n_prompt, n_new = sys.argv[1], *map(int, sys.argv[2:])
def resident():
    lines = open("/proc/self/status")
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))
before = resident()
threads = {"n_threads": n_threads, "n_threads_batch": n_threads}
size = {"n_ctx": n_prompt + n_new + 64, "n_batch": 512}
model = Llama(path, **size, **threads, use_mmap=False, verbose=False)
prompt = [(7 * i) % 31000 + 3 for i in range(n_prompt)]
model.eval(prompt)
model.reset()
start = time.perf_counter()
model.eval(prompt)
prefill = time.perf_counter() - start
times = []
for i in range(n_new):
    start = time.perf_counter()
    model.eval([(11 * i) % 31000 + 3])
    times.append(time.perf_counter() - start)
times.sort()
result = {"decode": 1 / times[len(times) // 2], "prefill": n_prompt / prefill}
print(json.dumps(result | {"resident": resident() - before}))
"""


def resident() -> int:
    """Bytes of this process in memory."""
    return next(
        int(line.split()[1]) * 1024
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("VmRSS")
    )


def build(compute: str | None, head_bits: int | None) -> Any:
    """The model with random weights, packed if a compute mode is given; bfloat16 weights of
    quantized layers never exist."""
    import torch
    from accelerate import init_empty_weights
    from transformers import LlamaConfig, LlamaForCausalLM

    from llmq.grid.spec import QuantSpec
    from llmq.grid.tensor import QuantizedTensor
    from llmq.inference.decoding import prepare_decoding
    from llmq.inference.module import quantized_modules, swap

    config = LlamaConfig(**SHAPE, dtype="bfloat16", eos_token_id=None)  # type: ignore[arg-type]
    with init_empty_weights(include_buffers=False):
        model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    spec = QuantSpec("int4", 128)
    for name, module in list(model.named_modules()):
        if compute is not None and isinstance(module, torch.nn.Linear) and name != "lm_head":
            packed = torch.randint(
                -(2**31), 2**31, (module.out_features, module.in_features // 8), dtype=torch.int32
            )
            scale = torch.full(
                (module.out_features, module.in_features // 128), 0.004, dtype=torch.float16
            )
            swap(
                model,
                {
                    name: QuantizedTensor(
                        packed, scale, None, spec, (module.out_features, module.in_features)
                    )
                },
            )
    for name, parameter in list(model.named_parameters()):
        parent, _, last = name.rpartition(".")
        value = (
            torch.ones(parameter.shape, dtype=torch.bfloat16)
            if "norm" in name
            else torch.empty(parameter.shape, dtype=torch.bfloat16).normal_(std=0.02)
        )
        setattr(model.get_submodule(parent), last, torch.nn.Parameter(value, requires_grad=False))
    for module in quantized_modules(model).values():
        module.set_compute(compute or "exact")
    return prepare_decoding(model.eval(), head_bits=head_bits)


def weight_bytes(model: Any) -> int:
    """Bytes of all parameters and buffers, shared ones once."""
    return sum(
        {
            tensor.data_ptr(): tensor.nbytes for tensor in (*model.parameters(), *model.buffers())
        }.values()
    )


def measure(name: str, threads: int, n_new: int) -> dict[str, float]:
    """One engine in this process."""
    # Everything that counts as a library is loaded before memory is looked at.
    import accelerate  # noqa: F401
    import torch
    from transformers import LlamaForCausalLM  # noqa: F401

    import llmq.inference.decoding  # noqa: F401
    import llmq_kernels.compiled.emit  # noqa: F401  loads LLVM, a library like the others
    from llmq.inference.cache import cache_bytes, in_place_cache
    from llmq.ptq.memory import release_freed_memory

    torch.set_num_threads(threads)
    before = resident()
    compute, head_bits = ENGINES[name] or (None, None)
    model = build(compute, head_bits)
    prompt = torch.arange(PROMPT)[None] * 7 % (SHAPE["vocab_size"] - 3) + 3
    cache: Any = None
    with torch.inference_mode():
        for _ in range(2):  # the first lays weights out and compiles
            cache = in_place_cache(model.config, PROMPT + n_new)
            started = time.perf_counter()
            model(input_ids=prompt, past_key_values=cache, logits_to_keep=1)
            prefill = time.perf_counter() - started
        stamps = [time.perf_counter()]

        def stamp(_ids: Any, _scores: Any, **_: Any) -> Any:
            stamps.append(time.perf_counter())
            return torch.zeros(1, dtype=torch.bool)

        # The way of `llmq generate`, with what transformers does around each token.
        del cache
        cache = in_place_cache(model.config, PROMPT + n_new)
        model.generate(
            prompt,
            past_key_values=cache,
            max_new_tokens=n_new,
            do_sample=False,
            pad_token_id=0,
            stopping_criteria=[stamp],
        )
    steps = [after - previous for previous, after in itertools.pairwise(stamps[1:])]
    release_freed_memory()
    held = weight_bytes(model)
    return {
        "decode": 1 / statistics.median(steps),
        "prefill": PROMPT / prefill,
        "resident": resident() - before,
        "weights": held,
        "cache": cache_bytes(cache),
    }


def write_gguf(path: Path) -> None:
    """The same shapes for llama.cpp: random Q4_0 blocks, and Q6_K ones for the head."""
    import gguf
    import numpy as np

    random = np.random.default_rng(0)
    width, mlp, vocabulary = SHAPE["hidden_size"], SHAPE["intermediate_size"], SHAPE["vocab_size"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(2048)
    writer.add_embedding_length(width)
    writer.add_block_count(SHAPE["num_hidden_layers"])
    writer.add_feed_forward_length(mlp)
    writer.add_head_count(SHAPE["num_attention_heads"])
    writer.add_head_count_kv(SHAPE["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_dimension_count(width // SHAPE["num_attention_heads"])
    writer.add_tokenizer_model("llama")
    writer.add_token_list(
        [b"<unk>", b"<s>", b"</s>", *(f"t{i}".encode() for i in range(3, vocabulary))]
    )
    writer.add_token_scores([0.0] * vocabulary)
    writer.add_token_types([2, 3, 3] + [1] * (vocabulary - 3))

    def blocks(name: str, rows: int, columns: int, kind: Any, scale_at: int) -> None:
        values, n_bytes = gguf.GGML_QUANT_SIZES[kind]
        data = random.integers(0, 256, (rows, columns // values, n_bytes), dtype=np.uint8)
        data[..., scale_at : scale_at + 2] = np.frombuffer(
            np.float16(0.004 if kind == gguf.GGMLQuantizationType.Q4_0 else 1e-5).tobytes(),
            np.uint8,
        )
        writer.add_tensor(name, data.reshape(rows, -1), raw_dtype=kind)

    q4, q6 = gguf.GGMLQuantizationType.Q4_0, gguf.GGMLQuantizationType.Q6_K
    blocks("token_embd.weight", vocabulary, width, q4, 0)
    blocks("output.weight", vocabulary, width, q6, 208)
    writer.add_tensor("output_norm.weight", np.ones(width, np.float32))
    for i in range(SHAPE["num_hidden_layers"]):
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{i}.{name}.weight", np.ones(width, np.float32))
        for name, rows, columns in (
            *((f"attn_{part}", width, width) for part in ("q", "k", "v", "output")),
            ("ffn_gate", mlp, width),
            ("ffn_up", mlp, width),
            ("ffn_down", width, mlp),
        ):
            blocks(f"blk.{i}.{name}.weight", rows, columns, q4, 0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def run(name: str, args: argparse.Namespace, model: Path) -> dict[str, float]:
    """One engine in a process of its own."""
    if name == LLAMA:
        command = [
            args.llama_python,
            "-c",
            LLAMA_CODE,
            str(model),
            str(args.threads),
            str(PROMPT),
            str(args.new_tokens),
        ]
    else:
        command = [
            sys.executable,
            __file__,
            "--engine",
            name,
            "--threads",
            str(args.threads),
            "--new-tokens",
            str(args.new_tokens),
        ]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    if done.returncode:
        raise SystemExit(f"{name}: {done.stderr.strip().splitlines()[-1]}")
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--llama-python", help="an interpreter with llama-cpp-python")
    parser.add_argument("--engine", choices=ENGINES, help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if args.engine:
        print(json.dumps(measure(args.engine, args.threads, args.new_tokens)))
        return
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model.gguf"
        engines = [*args.engines, *([LLAMA] if args.llama_python else [])]
        if args.llama_python:
            write_gguf(model)
        rounds = [{name: run(name, args, model) for name in engines} for _ in range(args.rounds)]
        file_bytes = model.stat().st_size if args.llama_python else 0
    results = {
        name: {
            key: statistics.median(each[name][key] for each in rounds) for key in rounds[0][name]
        }
        for name in engines
    }
    if LLAMA in results:
        results[LLAMA]["weights"] = file_bytes
    if args.json:
        print(
            json.dumps(
                {
                    "threads": args.threads,
                    "prompt": PROMPT,
                    "new_tokens": args.new_tokens,
                    "engines": results,
                }
            )
        )
        return
    print(
        f"{args.threads} threads, prompt {PROMPT}, {args.new_tokens} new tokens, medians of "
        f"{args.rounds} rounds\n\n| engine | decode, tokens/s | prefill, tokens/s | resident MB | "
        "weights MB |"
    )
    print("|---|---|---|---|---|")
    for name, row in results.items():
        print(
            f"| {name} | {row['decode']:.1f} | {row['prefill']:.0f} | {row['resident'] / 1e6:.0f} "
            f"| {row['weights'] / 1e6:.0f} |"
        )


if __name__ == "__main__":
    main()
