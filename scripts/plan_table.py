"""What quantizing and fine-tuning large models takes, one process beside many, by `llmq plan`:
computed from shapes, not measured.

    python scripts/plan_table.py --gpus 8 --gpu-memory 80GB

Weights are not needed: the shapes are those of common models of 8, 70, 30 (3 of them active) and
671 billion parameters. Operations are weighed as `llmq plan` weighs them for its time, and are
those of the process that has most to do."""

from __future__ import annotations

import argparse
import io
import json
import tempfile
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from transformers import DeepseekV3Config, LlamaConfig, PretrainedConfig, Qwen3MoeConfig

from llmq.commands.cli import main as llmq_main

OPERATIONS = "1e15 operations"
LLAMA = {"num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192}
MODELS: dict[str, PretrainedConfig] = {
    "8B": LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        **LLAMA,
    ),
    "70B": LlamaConfig(
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        **LLAMA,
    ),
    "30B-A3B": Qwen3MoeConfig(
        hidden_size=2048,
        moe_intermediate_size=768,
        num_hidden_layers=48,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        num_experts=128,
        num_experts_per_tok=8,
        vocab_size=151936,
    ),
    "671B": DeepseekV3Config(),
}


def planned(folder: Path, *options: str) -> dict[str, Any]:
    """What `llmq plan` says of a folder."""
    said = io.StringIO()
    with redirect_stdout(said):
        code = llmq_main(["plan", str(folder), "--json", *options])
    if code:
        raise SystemExit(f"llmq plan {' '.join(options)}: ended with {code}")
    found: dict[str, Any] = json.loads(said.getvalue())
    return found


def quantize_row(name: str, n: int, plan: dict[str, Any]) -> str:
    """Of one process, or of each of n."""
    many = plan.get("processes")
    flops = plan["estimate"]["flops"] if many is None else many["flops"]
    disk = plan["planned_disk_bytes"] if many is None else many["first_disk_bytes"]
    sent = 0 if many is None else many["sent_bytes"] / n
    return row(
        name,
        str(n),
        f"{plan['source_bytes'] / 1e9:.0f} -> {plan['planned_bytes'] / 1e9:.0f}",
        f"{flops / 1e15:.1f}",
        f"{(plan['planned_peak_bytes'] if many is None else many['peak_bytes']) / 1e9:.1f}",
        f"{disk / 1e9:.0f}",
        f"{sent / 1e9:.0f}",
    )


def qat_row(name: str, n: int, plan: dict[str, Any]) -> str:
    memory = plan["planned_peak_bytes"] / 1e9
    flops = plan["planned_seconds_per_million_tokens"] * plan["estimate"]["flops_per_second"]
    fits = "yes" if plan["fits"] else "no"
    return row(name, str(n), f"{memory:.1f}", fits, f"{flops / 1e15:.1f}")


def row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gpus", type=int, default=8, help="of a node; 1, 2, 4 or 8")
    parser.add_argument("--gpu-memory", default="80GB")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    args = parser.parse_args()
    machine = ("--tflops", "1", "--gpu-memory", args.gpu_memory)  # or products would be timed
    of_ptq = ("model", "GPUs", "GB of weight files", OPERATIONS, "peak GB", "GB of disk", "GB sent")
    ptq = [row(*of_ptq), "|---" * len(of_ptq) + "|"]
    of_qat = (
        "model",
        "GPUs",
        "peak GB",
        f"fits into {args.gpu_memory}",
        f"{OPERATIONS} a million tokens",
    )
    qat = [row(*of_qat), "|---" * len(of_qat) + "|"]
    with tempfile.TemporaryDirectory() as place:
        for name in args.models:
            folder = Path(place) / name
            config = MODELS[name]
            config.architectures = [f"{type(config).__name__.removesuffix('Config')}ForCausalLM"]
            config.dtype = "bfloat16"
            config.save_pretrained(folder)
            for n in (1, args.gpus):
                options = (*machine, *(("--gpus", str(n)) if n > 1 else ()))
                ptq.append(quantize_row(name, n, planned(folder, *options)))
                more = ("--qat", "--gradient-checkpointing", *options)
                qat.append(qat_row(name, n, planned(folder, *more)))
    print("\n".join(ptq))
    print()
    print("\n".join(qat))


if __name__ == "__main__":
    main()
