"""What training takes, from shapes alone: memory and floating-point operations. Estimates."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import prod

from transformers import PretrainedConfig, PreTrainedModel

from llmq.models import compat
from llmq.models.experts import module_of, token_shares
from llmq.qat.losses import CHUNK_TOKENS, COPIES
from llmq.qat.settings import OPTIMIZERS, QATSettings
from llmq.recipe import LayerPlan


@dataclass(frozen=True)
class Size:
    """n_parameters: that are trained; tied ones, which are apart on the meta device, count once.
    n_multiplied: that a token is multiplied with, which are fewer where it chooses its experts.
    n_values: that enter and leave the layers for a token."""

    n_parameters: int
    n_multiplied: int
    n_values: int

    @classmethod
    def of(cls, model: PreTrainedModel, plans: list[LayerPlan]) -> Size:
        """model: on the meta device will do. plans: of all its linear layers."""
        ties, shares = compat.ties(model), token_shares(model)
        n = sum(each.numel() for name, each in model.named_parameters() if name not in ties)
        idle = values = 0.0
        for plan in plans:
            share = shares.get(module_of(plan.layer.name), 1.0)
            idle += (1 - share) * prod(plan.layer.shape)
            values += share * sum(plan.layer.shape)
        return cls(n, round(n - idle), round(values))


@dataclass(frozen=True)
class Memory:
    """Bytes of one process. masters: float32. gradients, optimizer: of what is trained. teacher:
    its weights. quantized: what the forward pass keeps of the weights that it multiplied with.
    gathered: what a split model has whole for a time. activations: what a batch keeps for the
    backward pass. logits: copies of those of a chunk, float32."""

    masters: int
    gradients: int
    optimizer: int
    teacher: int
    quantized: int
    gathered: int
    activations: int
    logits: int

    @classmethod
    def of(
        cls,
        config: PretrainedConfig,
        plans: list[LayerPlan],
        settings: QATSettings,
        size: Size,
        teacher_bytes: int,
        n_processes: int = 1,
    ) -> Memory:
        """config: of the text model. teacher_bytes: of one of its weights. n_processes: that a
        split model lies in; embeddings and head of its teacher are in each."""
        n_bytes = 4 if settings.precision == "fp32" else 2
        n_blocks, n_parameters = config.num_hidden_layers, size.n_parameters
        # Each layer's input and output, and as much again around attention and norms; with
        # checkpointing, of one block, and what enters each.
        per_token = 2 * size.n_values * n_bytes
        if settings.gradient_checkpointing:
            per_token = per_token // n_blocks + n_blocks * config.hidden_size * n_bytes
        n_lora = 0 if settings.lora_rank is None else _lora_parameters(plans, settings.lora_rank)
        n_trained = n_lora or n_parameters
        n_parts = n_processes if settings.shard else 1
        n_of_layers = sum(prod(plan.layer.shape) for plan in plans)
        n_quantized = sum(prod(plan.layer.shape) for plan in plans if plan.spec is not None)
        n_outside = n_parameters - n_of_layers
        # Masters and gradients outside of blocks, those of a block, and the next one's masters.
        n_gathered = 2 * n_outside + 3 * n_of_layers // n_blocks if settings.shard else 0
        return cls(
            masters=4 * (n_parameters + n_lora) // n_parts,
            gradients=4 * n_trained // n_parts,
            optimizer=OPTIMIZERS[settings.optimizer] * n_trained // n_parts,
            teacher=teacher_bytes * (n_outside + n_of_layers // n_parts),
            quantized=n_bytes * n_quantized // (n_blocks if settings.gradient_checkpointing else 1),
            gathered=4 * n_gathered,
            activations=settings.tokens_per_batch * per_token,
            logits=COPIES * 4 * CHUNK_TOKENS * config.vocab_size,
        )

    @property
    def weight_bytes(self) -> int:
        """Of weights and optimizer, whatever the batch."""
        of_run = self.masters + self.gradients + self.optimizer + self.teacher
        return of_run + self.quantized + self.gathered

    @property
    def activation_bytes(self) -> int:
        """Of a batch."""
        return self.activations + self.logits

    @property
    def n_bytes(self) -> int:
        return self.weight_bytes + self.activation_bytes

    def to_json(self) -> dict[str, int]:
        return asdict(self)


def _lora_parameters(plans: list[LayerPlan], rank: int) -> int:
    """What is trained where all but low-rank changes is frozen: these, scales and zero points."""
    found = 0
    for plan in plans:
        if plan.spec is not None:
            n, k = plan.layer.shape
            found += rank * (n + k) + plan.spec.n_scales(n, k) * (1 if plan.spec.symmetric else 2)
    return found


def training_flops(n_multiplied: int, n_tokens: float) -> float:
    """Student forward and backward, teacher forward, and half an operation for the rest."""
    return 8.5 * n_multiplied * n_tokens
