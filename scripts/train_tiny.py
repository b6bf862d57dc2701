"""Train the bundled model `tiny` from scratch: a 3.7M-parameter Llama on the sources of the Python
standard library.

    python scripts/train_tiny.py llmq/assets/tiny

Grouped-query attention, tied embeddings, sizes that are multiples of 128, bf16 weights: small
enough to ship in a wheel, real enough that 2-bit rounding breaks it. Needs no download. About 25
minutes on two cores."""

from __future__ import annotations

import argparse
import math

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.utils.data import Dataset
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    set_seed,
)

from llmq.text.corpus import standard_library_documents

CONTEXT = 256
END_OF_TEXT = "<|endoftext|>"


def train_tokenizer(documents: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE: every text has tokens, no text has an unknown one."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=CONTEXT,
    )


class Windows(Dataset):  # type: ignore[type-arg]
    """Windows of CONTEXT tokens, at a fresh offset in each epoch-sized stride so that no window is
    seen twice."""

    def __init__(self, tokens: torch.Tensor, n_windows: int) -> None:
        self.tokens = tokens
        self.starts = torch.randint(
            len(tokens) - CONTEXT, (n_windows,), generator=torch.Generator().manual_seed(0)
        ).tolist()

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        window = self.tokens[self.starts[i] : self.starts[i] + CONTEXT]
        return {"input_ids": window, "labels": window}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out_dir")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch-size", type=int, default=32)
    args = parser.parse_args()
    set_seed(0)

    documents = standard_library_documents("train")
    tokenizer = train_tokenizer(documents, vocab_size=2048)
    tokens = torch.tensor(tokenizer(END_OF_TEXT.join(documents), verbose=False)["input_ids"])
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        rms_norm_eps=1e-6,
    )
    model = LlamaForCausalLM(config)
    print(
        f"{len(tokens):,} tokens of text, {model.num_parameters():,} parameters, "
        f"{args.steps * args.batch_size * CONTEXT:,} training tokens",
        flush=True,
    )

    arguments = TrainingArguments(
        output_dir=args.out_dir,
        max_steps=args.steps,
        per_device_train_batch_size=args.batch_size,
        learning_rate=2e-3,
        lr_scheduler_type="cosine",
        warmup_steps=100,
        weight_decay=0.1,
        adam_beta2=0.95,
        max_grad_norm=1.0,
        bf16=True,
        use_cpu=not torch.cuda.is_available(),
        save_strategy="no",
        logging_steps=50,
        report_to=[],
        seed=0,
    )
    result = Trainer(
        model=model, args=arguments, train_dataset=Windows(tokens, args.steps * args.batch_size)
    ).train()
    model.to(torch.bfloat16).save_pretrained(args.out_dir)
    tokenizer.save_pretrained(args.out_dir)
    print(
        f"mean training loss {result.training_loss:.3f} (perplexity "
        f"{math.exp(result.training_loss):.2f}), saved to {args.out_dir}"
    )


if __name__ == "__main__":
    main()
