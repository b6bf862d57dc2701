"""Train a LoRA adapter on a quantized folder with TRL, and merge it into the folder.

    python scripts/lora_finetune.py tiny-w4 tiny-w4-tuned --texts notes.txt --steps 20

Needs peft and trl (pip install peft trl). Reads top to bottom as an example: the model is
transformers' own class on llmq's kernels, so TRL and PEFT are used as with any other. Prints one
JSON object: losses, and the perplexity of the texts before, with the adapter and merged.
"""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch

import llmq

SCORED = 50  # texts that perplexity is measured on


def train(folder: Path, texts: list[str], adapter_dir: Path, args: argparse.Namespace) -> list[Any]:
    """Train an adapter on texts, save it, and return the loss of every step."""
    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    trainer = SFTTrainer(
        model=llmq.load(folder, dtype=args.dtype),
        processing_class=llmq.load_tokenizer(folder),
        train_dataset=Dataset.from_dict({"text": texts}),
        peft_config=LoraConfig(r=args.rank, target_modules="all-linear", task_type="CAUSAL_LM"),
        args=SFTConfig(
            output_dir=str(adapter_dir),
            max_steps=args.steps,
            learning_rate=args.learning_rate,
            per_device_train_batch_size=args.batch_size,
            max_length=args.sequence_length,
            gradient_checkpointing=True,
            bf16=False,  # the model has its dtype, and adapters are float32
            use_cpu=not torch.cuda.is_available(),
            logging_steps=1,
            save_strategy="no",
            report_to=[],
        ),
    )
    trainer.train()
    trainer.save_model(str(adapter_dir))
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def with_adapter(folder: Path, adapter_dir: Path, dtype: str) -> Any:
    """The quantized model with the adapter beside its weights."""
    from peft import PeftModel

    model = PeftModel.from_pretrained(llmq.load(folder, dtype=dtype), str(adapter_dir))
    return model.get_base_model()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="quantized by llmq, or in a format it reads")
    parser.add_argument("out", type=Path, help="the folder to write; the adapter goes beside it")
    parser.add_argument("--texts", type=Path, required=True, help="a text file: one text a line")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--sequence-length", type=int, default=128)
    parser.add_argument(
        "--dtype", default="auto", help="of activations: float32 is faster on some CPUs"
    )
    args = parser.parse_args()
    texts = [line for line in args.texts.read_text().splitlines() if line.strip()]
    adapter_dir = args.out.with_name(f"{args.out.name}-adapter")

    with redirect_stdout(sys.stderr):  # to which TRL prints
        losses = train(args.folder, texts, adapter_dir, args)
    report = llmq.merge_adapter(args.folder, adapter_dir, out=args.out)
    models = {
        "base": llmq.load(args.folder, dtype=args.dtype),
        "adapter": with_adapter(args.folder, adapter_dir, args.dtype),
        "merged": llmq.load(args.out, dtype=args.dtype),
    }
    tokenizer = llmq.load_tokenizer(args.folder)
    perplexities = {
        name: llmq.perplexity(
            model, tokenizer, texts[:SCORED], sequence_length=args.sequence_length
        ).value
        for name, model in models.items()
    }
    print(json.dumps({"losses": losses, "perplexity": perplexities, "merge": report}, indent=2))


if __name__ == "__main__":
    main()
