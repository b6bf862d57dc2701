"""Rounding against GPTQ on small mixtures of experts whose routing is real.

    python scripts/experts_quality.py WORK_DIR [--steps N] [--kinds mixtral qwen3_moe gpt_oss]

Each kind is trained for some minutes on the bundled text with the bundled tokenizer, quantized at
4 and 3 bits in groups of 32 by both methods, and its perplexity is taken on bundled text that it
was neither trained nor calibrated on. Prints a table in Markdown and writes one JSON line a
result."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

import llmq
from llmq.models.source import load_tokenizer, resolve
from llmq.recipe import Recipe
from llmq.text.corpus import standard_library_documents
from llmq.text.documents import calibration_windows

LENGTH, BATCH = 128, 16
SIZES = {
    "hidden_size": 128,
    "intermediate_size": 128,
    "moe_intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_experts": 8,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 256,
    "sliding_window": 64,
    "router_aux_loss_coef": 0.01,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


def train(kind: str, windows: torch.Tensor, steps: int, vocabulary: int) -> PreTrainedModel:
    """A small model of a kind after some steps of AdamW on random windows."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SIZES, vocab_size=vocabulary)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        batch = windows[torch.randint(len(windows), (BATCH,))]
        logits = model(batch, use_cache=False).logits[:, :-1]
        loss = cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            print(f"{kind}: step {step} of {steps}, loss {loss.item():.3f}", flush=True)
    return model.eval()


def perplexity(model: PreTrainedModel, windows: torch.Tensor) -> float:
    losses = []
    with torch.no_grad():
        for batch in windows.split(BATCH):
            logits = model(batch, use_cache=False).logits[:, :-1]
            losses.append(
                cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="none")
            )
    return float(torch.cat(losses).mean().exp())


def _tokens(tokenizer: PreTrainedTokenizerBase, split: str) -> torch.Tensor:
    text = "\n".join(standard_library_documents(split))
    return torch.tensor(tokenizer(text[:3_000_000], verbose=False)["input_ids"])


def _windows(ids: torch.Tensor) -> torch.Tensor:
    return ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("work_dir", type=Path)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--kinds", nargs="+", default=["mixtral", "qwen3_moe", "gpt_oss"])
    args = parser.parse_args()
    args.work_dir.mkdir(parents=True, exist_ok=True)
    tokenizer = load_tokenizer(resolve("tiny"))
    learned = _windows(_tokens(tokenizer, "train"))
    held_out = _windows(_tokens(tokenizer, "eval"))[:128]
    text = _tokens(tokenizer, "calibration")
    calibration = calibration_windows(text, 64, LENGTH, 0, "text").tokens
    lines = ["| kind | full precision | bits | RTN | GPTQ |", "|---|---|---|---|---|"]
    for kind in args.kinds:
        folder = args.work_dir / kind
        if not folder.exists():
            model = train(kind, learned, args.steps, len(tokenizer))
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        base = perplexity(llmq.load(folder, dtype="float32"), held_out)
        for bits in (4, 3):
            found = {}
            for method in ("rtn", "gptq"):
                model = llmq.load(folder, dtype="float32")
                recipe = Recipe.uniform(f"w{bits}g32", method=method)
                llmq.quantize(model, recipe, None if method == "rtn" else calibration)
                found[method] = perplexity(model, held_out)
            row = {"kind": kind, "bits": bits, "full_precision": base, **found}
            with (args.work_dir / "results.jsonl").open("a") as file:
                file.write(json.dumps(row) + "\n")
            lines.append(
                f"| `{kind}` | {base:.2f} | {bits} | {found['rtn']:.2f} | {found['gptq']:.2f} |"
            )
            print(lines[-1], flush=True)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
