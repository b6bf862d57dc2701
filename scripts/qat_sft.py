"""Fine-tune a model on chats with TRL, through its quantizer, and save what was trained.

    python scripts/qat_sft.py HuggingFaceTB/SmolLM2-135M-Instruct out --data chats.jsonl --steps 50

Needs trl (pip install trl). Reads top to bottom as an example: the trainer is TRL's own, with one
callback. `--lora-rank 16` trains low-rank changes of the weights, through the quantizer, too, in a
fraction of the memory. Prints one JSON object: the loss of every step, and how many codes changed.
"""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import redirect_stdout
from pathlib import Path

import torch

import llmq


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    parser.add_argument("--data", required=True, help='lines of {"messages": [...]}, or a Hub id')
    parser.add_argument("--recipe", default="w4g64", help="a spec, or a scheme such as W4A8")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--lora-rank", type=int)
    args = parser.parse_args()

    with redirect_stdout(sys.stderr):  # to which TRL prints
        log = train(args)
    losses = [row["loss"] for row in log if "loss" in row]
    flips = [row["flip_rate"] for row in log if "flip_rate" in row]
    print(json.dumps({"losses": losses, "flip_rates": flips, "out": str(args.out)}, indent=2))


def train(args: argparse.Namespace) -> list[dict[str, float]]:
    """Quantize, train, freeze, save; returns the Trainer's log."""
    from datasets import load_dataset
    from trl import SFTConfig, SFTTrainer

    model = llmq.load(args.model, dtype="float32")
    tokenizer = llmq.load_tokenizer(args.model)
    is_file = Path(args.data).is_file()
    chats = load_dataset("json", data_files=args.data) if is_file else load_dataset(args.data)

    # Where it starts: GPTQ on chats as the model reads them.
    texts = [
        tokenizer.apply_chat_template(row["messages"], tokenize=False)
        for row in chats["train"].select(range(min(64, len(chats["train"]))))
    ]
    llmq.prepare_qat(model, args.recipe, texts, tokenizer=tokenizer, lora_rank=args.lora_rank)

    optimizer = torch.optim.AdamW(llmq.qat_parameter_groups(model), betas=(0.9, 0.95))
    trainer = SFTTrainer(
        model=model,
        processing_class=tokenizer,
        train_dataset=chats["train"],
        callbacks=[llmq.QATCallback()],
        optimizers=(optimizer, None),
        args=SFTConfig(
            output_dir=str(args.out.with_name(f"{args.out.name}-run")),
            max_steps=args.steps,
            per_device_train_batch_size=args.batch_size,
            max_length=args.sequence_length,
            packing=True,
            warmup_steps=max(1, args.steps // 30),
            lr_scheduler_type="cosine",
            bf16=torch.cuda.is_available(),
            use_cpu=not torch.cuda.is_available(),
            logging_steps=1,
            save_strategy="no",
            report_to=[],
        ),
    )
    trainer.train()

    # What was trained, packed: the same values bit for bit.
    llmq.freeze(model)
    llmq.save(model, args.out, tokenizer=tokenizer)
    return trainer.state.log_history


if __name__ == "__main__":
    main()
