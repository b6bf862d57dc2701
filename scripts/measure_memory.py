"""Peak memory of `llmq quantize` on a synthetic Llama with random weights, at two depths: what one
block needs, and that depth does not matter.

    python scripts/measure_memory.py
    python scripts/measure_memory.py --experts 64 --intermediate 512 --depths 8 16

Writes models of about 1.9 and 3.6 GB into a temporary folder, quantizes each with 32 x 512 tokens
in a process of its own, and prints the peak resident memory above that of an interpreter with the
libraries loaded, as it stood after 1, 2, 4, ... blocks and at the end. With --experts the model is
a Qwen3-MoE, of 3.7 and 7.2 GB as above."""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer, LlamaConfig, PretrainedConfig, Qwen3MoeConfig

from llmq.models.source import meta_model, resolve

# The peak is the kernel's own count of resident pages, shared libraries included.
_BASELINE = "import torch, transformers, llmq.ptq.run"
_RUN = "import sys; from llmq.commands.cli import main; code = main(sys.argv[1:])"
# Not that of getrusage, which begins with what the process that started this one held.
_PEAK = (
    "; import sys; status = open('/proc/self/status').read(); "
    "print('PEAK', status.split('VmHWM:')[1].split()[0], file=sys.stderr)"
)


def config_of(args: argparse.Namespace, depth: int) -> PretrainedConfig:
    """What the options say, dense or with experts of `args.intermediate` each."""
    shape = {
        "hidden_size": args.width,
        "num_hidden_layers": depth,
        "num_attention_heads": args.width // 64,
        "num_key_value_heads": args.width // 64,
        "vocab_size": args.vocabulary,
        "max_position_embeddings": 2048,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "dtype": "bfloat16",
    }
    if not args.experts:
        config: PretrainedConfig = LlamaConfig(intermediate_size=args.intermediate, **shape)
        config.architectures = ["LlamaForCausalLM"]
        return config
    config = Qwen3MoeConfig(
        num_experts=args.experts,
        num_experts_per_tok=min(8, args.experts),
        moe_intermediate_size=args.intermediate,
        head_dim=64,
        **shape,
    )
    config.architectures = ["Qwen3MoeForCausalLM"]
    return config


def write_model(folder: Path, config: PretrainedConfig) -> int:
    """A bfloat16 model with random weights, one shard per block, without ever holding it as a
    whole. Returns its bytes."""
    folder.mkdir(parents=True)
    tokenizer = AutoTokenizer.from_pretrained(resolve("tiny"))
    # as many tokens as rows of the embeddings, or it would not belong to the model
    n_unused = config.vocab_size - len(tokenizer)
    tokenizer.add_tokens([f"<unused{i}>" for i in range(n_unused)])
    tokenizer.save_pretrained(folder)
    config.save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    groups: dict[str, list[tuple[str, torch.Size]]] = {}
    for name, parameter in meta_model(config).named_parameters():
        group = name.split(".")[2] if ".layers." in name else "outside"
        groups.setdefault(group, []).append((name, parameter.shape))
    index, total = {}, 0
    for group, entries in groups.items():
        tensors = {
            name: (
                torch.randn(shape, generator=generator) * 0.02
                if len(shape) > 1
                else torch.ones(shape)
            ).bfloat16()
            for name, shape in entries
        }
        save_file(tensors, folder / f"model-{group}.safetensors", metadata={"format": "pt"})
        index.update(dict.fromkeys(tensors, f"model-{group}.safetensors"))
        total += sum(tensor.nbytes for tensor in tensors.values())
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": index})
    )
    return total


@dataclass
class Run:
    """peak: resident megabytes of the whole process. after: the peak so far when block n was done.
    seconds: that each block took."""

    peak: float = 0.0
    after: dict[int, float] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)


def measure(program: str, *arguments: str, n_blocks: int | None = None) -> Run:
    """Run a Python process and read its peaks. n_blocks: end it after so many."""
    run, log, started = Run(), list[str](), 0.0
    with subprocess.Popen(
        [sys.executable, "-c", program + _PEAK, *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            log.append(line)
            if found := re.match(r"blocks (\d+)/", line):
                done, now = int(found[1]), time.monotonic()
                if done:
                    run.after[done] = peak_of(process.pid)
                    run.seconds.append(now - started)
                started = now
                if done == n_blocks:
                    process.kill()
                    run.peak = run.after[done]
                    return run
            elif line.startswith("PEAK "):
                run.peak = int(line.split()[1]) / 1024
    if process.returncode or not run.peak:
        sys.exit("".join(log))
    return run


def peak_of(pid: int) -> float:
    """Peak resident megabytes of a running process so far."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--depths", type=int, nargs="+", default=[16, 32])
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--intermediate", type=int, default=5632)
    parser.add_argument("--experts", type=int, default=0, help="of every block (default: dense)")
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--blocks", type=int, help="end each run after so many (default: all)")
    parser.add_argument("--folder", type=Path, help="where to write (default: a temporary folder)")
    parser.add_argument(
        "--quantize-options",
        nargs=argparse.REMAINDER,
        default=[],
        help="further options of `llmq quantize`",
    )
    args = parser.parse_args()

    baseline = measure(_BASELINE).peak
    print(f"interpreter with the libraries loaded: {baseline:.0f} MB", flush=True)
    for depth in args.depths:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            total = write_model(Path(folder) / "model", config_of(args, depth))
            options = [
                "--samples",
                str(args.samples),
                "--sequence-length",
                str(args.sequence_length),
                *args.quantize_options,
            ]
            model, out = str(Path(folder) / "model"), str(Path(folder) / "out")
            run = measure(_RUN, "quantize", model, out, *options, n_blocks=args.blocks)
            after = ", ".join(
                f"{peak - baseline:.0f} after {n}"
                for n, peak in run.after.items()
                if n & (n - 1) == 0
            )
            print(
                f"{depth} blocks, {total / 1e9:.2f} GB: peak {run.peak:.0f} MB, "
                f"{run.peak - baseline:.0f} MB above ({after}); seconds per block "
                f"{' '.join(f'{each:.1f}' for each in run.seconds)}",
                flush=True,
            )


if __name__ == "__main__":
    main()
