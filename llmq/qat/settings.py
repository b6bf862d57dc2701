"""What a fine-tuning run does, apart from model and texts."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from llmq.errors import LlmqError
from llmq.fields import check_fields
from llmq.grid.scheme import read_scheme
from llmq.grid.spec import QuantSpec
from llmq.ptq.methods import split_name
from llmq.ptq.precision import usual_precision
from llmq.qat.lora import check_rank
from llmq.qat.losses import LossWeights
from llmq.qat.schedule import Phases
from llmq.qat.weights import QuantizerName

# Names that transformers' Trainer gives them -> bytes of their states for one weight.
OPTIMIZERS = {
    "adamw_torch": 8,
    "adamw_torch_fused": 8,
    "adamw_bnb_8bit": 2,
    "adamw_torch_8bit": 2,
    "adamw_torch_4bit": 1,
}
PACKAGES = {
    "adamw_bnb_8bit": "bitsandbytes",
    "adamw_torch_8bit": "torchao",
    "adamw_torch_4bit": "torchao",
}  # that they come from, where not from torch


@dataclass(frozen=True)
class Scheme:
    """weights: the grid. activations: "none", "int8-token" or "int8-static". kv_bits: bits of keys
    and values, or None for full precision."""

    weights: QuantSpec
    activations: Literal["none", "int8-token", "int8-static"] = "none"
    kv_bits: int | None = None

    @classmethod
    def parse(cls, text: str) -> Scheme:
        """Read w4, w3, w2, w8 or ternary, with a8 and kv8 or kv4 behind where wanted: `w4a8kv8`
        (see `llmq.grid.scheme`).
        Raises `LlmqError` with the forms that exist."""
        found = read_scheme(text)
        if found is None:
            raise LlmqError(
                f"unknown scheme {text!r}: expected w8, w4, w3, w2 or ternary, with a8 and kv8 or "
                "kv4 behind where wanted, such as w4a8kv8"
            )
        weights, activations = found
        return cls(weights, activations.kind, activations.kv_bits)


@dataclass(frozen=True)
class QATSettings:
    """scheme, quantizer: what is trained (see `llmq.qat.weights`). init: the method of the start
    (see `llmq.ptq.methods`), with transforms before it or without. kv_before_rope: quantize keys
    before the rotary embedding (LLM-QAT).

    max_tokens, max_steps: length of the run, one of them; both None: one pass over the text.
    sequence_length, batch_size: of a process; accumulation: batches per step. lr_weights,
    lr_scales: absolute peaks; None: by the grid of each layer (`llmq.qat.rates`). optimizer: by
    transformers' name, `OptimizerNames`. lora_rank: train a change of this rank of every weight and
    the scales, see `llmq.qat.lora`; None: all of the model. precision: of the arithmetic; masters
    are float32 always; None: see `on`. shard: split masters, gradients and moments over the
    processes, see `llmq.qat.shards`. loss, phases: see there. log_every, save_every,
    eval_every: steps; 0: about 100, 5 and 5 times in a run, checkpoints always where there is a row
    of the log too, so that a resumed run's rows are means of the same steps. n_held_out: windows
    spread over the text that are not trained on, for deciding whether training helped."""

    scheme: Scheme
    quantizer: QuantizerName = "lsq"
    init: str = "gptq"
    kv_before_rope: bool = False
    max_tokens: int | None = None
    max_steps: int | None = None
    sequence_length: int = 2048
    batch_size: int = 8
    accumulation: int = 1
    lr_weights: float | None = None
    lr_scales: float | None = None
    optimizer: str = "adamw_torch"
    lora_rank: int | None = None
    precision: Literal["bf16", "fp16", "fp32"] | None = None
    gradient_checkpointing: bool = False
    shard: bool = False
    loss: LossWeights = field(default_factory=LossWeights)
    phases: Phases = field(default_factory=Phases)
    max_grad_norm: float = 1.0
    seed: int = 0
    log_every: int = 0
    save_every: int = 0
    eval_every: int = 0
    n_held_out: int = 32

    def __post_init__(self) -> None:
        check_fields(self)
        _, method = split_name(self.init)  # or it is refused here
        if self.quantizer != "lsq" and method != "rtn":
            raise LlmqError(
                f"quantizer {self.quantizer} chooses its scales itself, so another start than "
                "plain rounding would be lost; give --init rtn"
            )
        if self.max_tokens is not None and self.max_steps is not None:
            raise LlmqError(
                f"--max-tokens {self.max_tokens} and --max-steps {self.max_steps} both set the "
                "length of the run; give one of them"
            )
        if self.optimizer not in OPTIMIZERS:
            raise LlmqError(f"--optimizer {self.optimizer}: expected {' or '.join(OPTIMIZERS)}")
        if self.lora_rank is not None:
            check_rank(self.lora_rank)
        if self.shard and (self.lora_rank is not None or self.precision == "fp16"):
            other = "--precision fp16" if self.lora_rank is None else "--lora-rank"
            raise LlmqError(f"--shard and {other}: are not made for each other; give one of them")
        if self.log_every and self.save_every % self.log_every:
            raise LlmqError(
                f"--save-every {self.save_every} is no multiple of --log-every {self.log_every}: "
                "the means of a resumed run's log would be of other steps"
            )
        if self.sequence_length < 2 or self.batch_size < 1 or self.accumulation < 1:
            raise LlmqError(
                f"batches of {self.batch_size} x {self.sequence_length} tokens, "
                f"{self.accumulation} per step: expected at least one sequence of 2 tokens"
            )

    @property
    def tokens_per_batch(self) -> int:
        return self.batch_size * self.sequence_length

    def windows_per_step(self, n_processes: int = 1) -> int:
        """Windows that one optimizer step takes, of all processes together."""
        return self.batch_size * self.accumulation * n_processes

    def n_steps(self, n_windows: int, n_processes: int = 1) -> int:
        """Optimizer steps for a text of `n_windows` windows. Raises `LlmqError` for `max_tokens` of
        less than a step."""
        per_step = self.windows_per_step(n_processes) * self.sequence_length
        if self.max_steps is not None:
            return self.max_steps
        if self.max_tokens is not None and self.max_tokens < per_step:
            raise LlmqError(
                f"--max-tokens {self.max_tokens}: one step takes {per_step}; give more, or a "
                "smaller --batch-size or --sequence-length"
            )
        return max(
            1,
            (n_windows * self.sequence_length if self.max_tokens is None else self.max_tokens)
            // per_step,
        )

    def cadence(self, n_steps: int) -> tuple[int, int]:
        """Steps between rows of the log, and between checkpoints: a multiple of it."""
        log = self.log_every or max(1, n_steps // 100)
        save = self.save_every or max(1, n_steps // 5 // log) * log
        while save % log:  # --save-every alone was given
            log -= 1
        return log, save

    def on(self, device: str) -> QATSettings:
        """These settings with the arithmetic of a device where none is named."""
        return replace(self, precision=self.precision or usual_precision(device))

    def to_json(self) -> dict[str, Any]:
        return asdict(self)
