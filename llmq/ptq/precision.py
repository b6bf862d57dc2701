"""What the parts of a run are computed in.

What the quantized model computes is always float32. Two parts are not its results and may be faster
where the model is stored in bfloat16 and the processor multiplies that natively:

    stream    what the full-precision model computes beside it, where only means of it are used;
    training  the forward and backward passes of block-wise tuning, on float32 masters; the errors
              that decide whether its result is kept are measured in float32.

The report names both."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PretrainedConfig

from llmq.ptq.methods import method_of
from llmq.recipe import Recipe


@dataclass(frozen=True)
class Precision:
    """stream: dtype of the full-precision stream. training: dtype of block-wise tuning's passes.
    See the module's text."""

    stream: torch.dtype = torch.float32
    training: torch.dtype = torch.float32

    @classmethod
    def of(cls, config: PretrainedConfig, recipe: Recipe, device: str) -> Precision:
        """What a model with this config is best computed in on a device; `recipe.autocast` decides
        about training where it is given."""
        is_native = (
            config.dtype or config.get_text_config().dtype
        ) == torch.bfloat16 and multiplies_bfloat16(device)
        needs = method_of(recipe).needs(recipe)
        needs_means_only = needs.both_streams and not needs.tuning
        trains_in_bfloat16 = needs.tuning and (
            is_native if recipe.autocast is None else recipe.autocast
        )
        return cls(
            torch.bfloat16 if is_native and needs_means_only else torch.float32,
            torch.bfloat16 if trains_in_bfloat16 else torch.float32,
        )


def multiplies_bfloat16(device: str) -> bool:
    """Whether a device has instructions for products of bfloat16 numbers; without them they are
    slower than float32."""
    if device.startswith("cuda"):
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
