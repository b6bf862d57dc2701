"""The one way of loading: a transformers quantizer for `quant_method: "llmq"`, which also reads
GPTQ folders under a rewritten config.

Before loading, every layer that has packed tensors in the safetensors headers is replaced by a
module with exactly these tensors, so that transformers' own loader fills them; after loading these
become `QuantLinear`. The headers decide, not the config: a layer that some tool left out or added
is treated as it is stored.

transformers initialises at random what it does not find. So names, shapes and values are checked
here, before and after, and every fault is an error."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

METHOD = "llmq"
_DTYPES = {
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "I32": torch.int32,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I64": torch.int64,
}


class StoredLinear(nn.Module):
    """A place for the stored tensors of one layer while transformers loads them. shape: (N, K) of
    the weight."""

    def __init__(
        self, headers: dict[str, tuple[torch.dtype, tuple[int, ...]]], shape: tuple[int, int]
    ) -> None:
        super().__init__()
        self.shape = shape
        if (
            "weight" not in headers
            # some models reach into their layers while they are initialised (GPT-2 into c_proj); this
            # takes what they write
        ):
            self.weight = torch.empty(0)
        for suffix, (dtype, tensor_shape) in headers.items():
            self.register_buffer(suffix, torch.empty(tensor_shape, dtype=dtype, device="meta"))

    def tensors(self) -> dict[str, Tensor]:
        return dict(self.named_buffers())


@register_quantization_config(METHOD)
class LlmqConfig(QuantizationConfigMixin):
    """The `quantization_config` of an llmq folder, or of a GPTQ or BitNet folder with
    `quant_method` rewritten and `format` added. Keys as in `llmq.formats`."""

    def __init__(self, quant_method: str = METHOD, **settings: Any) -> None:
        self.quant_method = quant_method  # type: ignore[assignment]
        for key, value in settings.items():
            setattr(self, key, value)

    def settings(self) -> dict[str, Any]:
        return dict(vars(self))


@register_quantizer(METHOD)
class LlmqQuantizer(HfQuantizer):
    """Loads packed layers into `QuantLinear` modules."""

    requires_calibration = True
    quantization_config: LlmqConfig

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Sequence[str] | None = None, **kwargs: Any
    ) -> None:
        from llmq.errors import LlmqError
        from llmq.formats import FORMATS
        from llmq.models.arch import linear_shape
        from llmq.models.names import match_names, stored_to_model_names
        from llmq.models.shards import read_header

        if not checkpoint_files:
            raise LlmqError(
                "a quantized checkpoint can only be loaded from safetensors files; use llmq.load(folder)"
            )
        fmt = FORMATS[self.quantization_config.settings().get("format", METHOD)]
        headers = {
            name: entry
            for path in checkpoint_files
            for name, entry in read_header(Path(path)).items()
        }
        layers: dict[str, dict[str, tuple[torch.dtype, tuple[int, ...]]]] = {}
        for name, entry in headers.items():
            layer, _, suffix = name.rpartition(".")
            if f"{layer}.{fmt.marker}" in headers:
                if entry["dtype"] not in _DTYPES:
                    raise LlmqError(
                        f"{name}: dtype {entry['dtype']} is not used by any quantized format; the checkpoint is damaged"
                    )
                layers.setdefault(layer, {})[suffix] = (_DTYPES[entry["dtype"]], entry["shape"])
        names = stored_to_model_names(model, [f"{layer}.weight" for layer in layers])
        for layer, tensors in layers.items():
            name = names[f"{layer}.weight"].removesuffix(".weight")
            shape = (
                linear_shape(model.get_submodule(name))
                if f"{name}.weight" in model.state_dict()
                else None
            )
            if shape is None:
                raise LlmqError(
                    f"{layer}: packed tensors are stored for it, but {type(model).__name__} has no such linear layer; config.json does not belong to these weights"
                )
            model.set_submodule(name, StoredLinear(tensors, shape))
        match_names(model, headers)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        from llmq.formats import FORMATS
        from llmq.formats.native import NATIVE
        from llmq.kv import quantize_kv
        from llmq.models.arch import linear_shape
        from llmq.modules import QuantLinear
        from llmq.spec import ActSpec

        settings = self.quantization_config.settings()
        fmt = FORMATS[settings.get("format", METHOD)]
        activations = ActSpec.from_json(settings.get("activations") or {})
        head = model.get_output_embeddings()
        # What is linear still is kept as it is, whether or not the config says so: GPTQ's has no
        # list of such layers.
        specs: dict[str, Any] = {
            name: None
            for name, module in model.named_modules()
            if linear_shape(module) is not None and module is not head
        }
        for name, module in list(model.named_modules()):
            if isinstance(module, StoredLinear):
                tensors = module.tensors()
                bias = tensors.pop("bias", None)
                qtensor = fmt.read(name, tensors, settings, module.shape)
                qtensor.validate(name)
                specs[name] = qtensor.spec
                model.set_submodule(name, QuantLinear(qtensor, bias, activations))
        quantize_kv(model, activations.kv_bits, before_rope=activations.kv_before_rope)
        # In memory everything is native, and so is what `save_pretrained` writes.
        self.quantization_config = LlmqConfig(
            **NATIVE.config(specs), activations=activations.to_json()
        )
        model.config.quantization_config = self.quantization_config
        return model

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False
