"""What training takes, from shapes alone: memory and floating-point operations. Estimates."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from transformers import PretrainedConfig, PreTrainedModel

from llmq.models import compat
from llmq.qat.losses import CHUNK_TOKENS, COPIES
from llmq.qat.settings import OPTIMIZERS, QATSettings
from llmq.recipe import LayerPlan


@dataclass(frozen=True)
class Memory:
    """Bytes of one process. masters: float32. gradients, optimizer: of what is trained. teacher:
    its weights. activations: what a batch keeps for the backward pass. logits: copies of
    those of a chunk, float32."""

    masters: int
    gradients: int
    optimizer: int
    teacher: int
    activations: int
    logits: int

    @classmethod
    def of(
        cls,
        config: PretrainedConfig,
        plans: list[LayerPlan],
        settings: QATSettings,
        n_parameters: int,
        teacher_bytes: int,
    ) -> Memory:
        """config: of the text model. teacher_bytes: of one of its weights."""
        # Each layer's input and output, and as much again around attention and norms; with
        # checkpointing, of one block.
        per_token = (
            2
            * sum(sum(plan.layer.shape) for plan in plans)
            * (4 if settings.precision == "fp32" else 2)
        )
        n_lora = 0 if settings.lora_rank is None else _lora_parameters(plans, settings.lora_rank)
        n_trained = n_lora or n_parameters
        n_kept = config.num_hidden_layers if settings.gradient_checkpointing else 1
        return cls(
            masters=4 * (n_parameters + n_lora),
            gradients=4 * n_trained,
            optimizer=OPTIMIZERS[settings.optimizer] * n_trained,
            teacher=teacher_bytes * n_parameters,
            activations=settings.tokens_per_batch * per_token // n_kept,
            logits=COPIES * 4 * CHUNK_TOKENS * config.vocab_size,
        )

    @property
    def weight_bytes(self) -> int:
        """Of weights and optimizer, whatever the batch."""
        return self.masters + self.gradients + self.optimizer + self.teacher

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


def training_flops(n_parameters: int, n_tokens: float) -> float:
    """Student forward and backward, teacher forward, and half an operation for the rest."""
    return 8.5 * n_parameters * n_tokens


def n_parameters(model: PreTrainedModel) -> int:
    """Weights that are trained: tied ones, which are apart on the meta device, count once."""
    ties = compat.ties(model)
    return sum(each.numel() for name, each in model.named_parameters() if name not in ties)
