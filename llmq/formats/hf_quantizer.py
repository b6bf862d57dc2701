"""The one way of loading: a transformers quantizer for `quant_method: "llmq"`, which also reads
GPTQ folders under a rewritten config.

Before loading, every layer that has packed tensors in the safetensors headers is replaced by a
module with exactly these tensors, so that transformers' own loader fills them; after loading these
become `QuantLinear`. The headers decide, not the config: a layer that some tool left out or added
is treated as it is stored.

transformers initialises at random what it does not find. So names, shapes and values are checked
here, before and after, and every fault is an error."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from llmq.formats.registry import NAMES
from llmq.models.compat import (
    HfQuantizer,
    QuantizationConfigMixin,
    adopt_methods,
    register_quantization_config,
    register_quantizer,
)

if TYPE_CHECKING:
    from llmq.formats.base import Format
    from llmq.models.shards import ShardReader

AUTO_ROUND = "auto-round"  # what AutoRound calls its folders in GPTQ's layout
METHOD = "llmq"  # what registers it; as in `llmq.formats.base`
_DTYPES = {
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "I32": torch.int32,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
}


_KNOWN: ContextVar[ShardReader | None] = ContextVar("known", default=None)


@contextmanager
def knowing(shards: ShardReader) -> Iterator[None]:
    """While transformers loads a folder whose headers are read already."""
    token = _KNOWN.set(shards)
    try:
        yield
    finally:
        _KNOWN.reset(token)


def _headers(paths: list[Path]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """dtype, as safetensors calls it, and shape of every tensor of some files."""
    from llmq.models.shards import read_header

    known = _KNOWN.get()
    if known is not None and set(paths) == set(known.names.values()):
        return {name: (known.dtypes[name], known.shapes[name]) for name in known.names}
    return {
        name: (entry["dtype"], entry["shape"])
        for path in paths
        for name, entry in read_header(path).items()
    }


class StoredLinear(nn.Module):
    """A place for the stored tensors of one layer while transformers loads them. shape: (N, K) of
    the weight. embeddings: the module that is replaced, where it is these."""

    def __init__(
        self,
        headers: dict[str, tuple[torch.dtype, tuple[int, ...]]],
        shape: tuple[int, int],
        embeddings: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.shape = shape
        # in a tuple, or it would be a part of this module
        self.replaced: tuple[Any, ...] = () if embeddings is None else (embeddings,)
        # Some models reach into their layers while they are initialised (GPT-2 into c_proj); this
        # takes what they write.
        if "weight" not in headers:
            self.weight = torch.empty(0)
        for suffix, (dtype, tensor_shape) in headers.items():
            self.register_buffer(suffix, torch.empty(tensor_shape, dtype=dtype, device="meta"))

    def tensors(self) -> dict[str, Tensor]:
        return dict(self.named_buffers())

    @property
    def has_weight(self) -> bool:
        """Not where it is the tensor of another place, too."""
        return bool(self.tensors().keys() - {"bias"})


@register_quantization_config(METHOD)
class LlmqConfig(QuantizationConfigMixin):
    """The `quantization_config` of an llmq folder, or of a GPTQ or BitNet folder with
    `quant_method` rewritten and `format` added. Keys as in `llmq.formats`."""

    # The settings that are written in place of these: see `get_state_dict_and_metadata`.
    written: dict[str, Any] | None = None

    def __init__(self, quant_method: str = METHOD, **settings: Any) -> None:
        self.quant_method = quant_method  # type: ignore[assignment]
        for key, value in settings.items():
            setattr(self, key, value)

    @classmethod
    def from_dict(
        cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        """Of a folder of any method that llmq reads, under llmq's own."""
        from types import SimpleNamespace

        from llmq.formats.settings import quantization_settings

        settings = quantization_settings(SimpleNamespace(quantization_config=config_dict))
        config = cls(**(settings or {}))
        return (config, kwargs) if return_unused_kwargs else config

    def settings(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key != "written"}

    def to_dict(self) -> dict[str, Any]:
        return copy.deepcopy(self.settings() if self.written is None else self.written)


adopt_methods(LlmqConfig, (*NAMES, AUTO_ROUND))


@register_quantizer(METHOD)
class LlmqQuantizer(HfQuantizer):
    """Loads packed layers into `QuantLinear` modules."""

    requires_calibration = True
    quantization_config: LlmqConfig
    # the format of the folder that the model came from, None for one that was quantized in memory
    stored_format: Format | None = None
    # why the model cannot be written as it is, or None
    unsavable: str | None = None
    # stored tensors of packed layers that decide nothing
    left_out: tuple[str, ...] = ()
    # of the parameters as the model was built, by name
    built_dtypes: Mapping[str, torch.dtype] = {}

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Sequence[str] | None = None, **kwargs: Any
    ) -> None:
        from llmq.errors import LlmqError
        from llmq.formats.settings import format_of
        from llmq.formats.tables import reserve_tie
        from llmq.models.experts import unfuse
        from llmq.models.names import check_dtypes, match_names, stored_to_model_names
        from llmq.models.outside import is_plain
        from llmq.models.site import site_of

        if not checkpoint_files:
            raise LlmqError(
                "a quantized checkpoint can only be loaded from safetensors files; use "
                "llmq.load(folder)"
            )
        fmt = self.stored_format = format_of(self.quantization_config.settings())
        unfuse(model)
        self.built_dtypes = {name: each.dtype for name, each in model.named_parameters()}
        headers = _headers([Path(path) for path in checkpoint_files])
        layers: dict[str, dict[str, tuple[torch.dtype, tuple[int, ...]]]] = {}
        for name, (dtype, stored_shape) in headers.items():
            layer, _, suffix = name.rpartition(".")
            if f"{layer}.{fmt.marker}" not in headers:
                continue
            if dtype not in _DTYPES:
                raise LlmqError(
                    f"{name}: dtype {dtype} is not used by any quantized format; the checkpoint is "
                    "damaged"
                )
            layers.setdefault(layer, {})[suffix] = (_DTYPES[dtype], stored_shape)
        names = stored_to_model_names(model, [f"{layer}.weight" for layer in layers])
        state = model.state_dict()
        for layer, tensors in layers.items():
            name = names[f"{layer}.weight"].removesuffix(".weight")
            is_there = f"{name}.weight" in state
            module = model.get_submodule(name) if is_there else None
            if is_plain(module) and module is model.get_input_embeddings():
                model.set_submodule(name, StoredLinear(tensors, tuple(module.weight.shape), module))
                continue
            site = None if module is None else site_of(module)
            if site is None:
                raise LlmqError(
                    f"{layer}: packed tensors are stored for it, but {type(model).__name__} has no "
                    "such linear layer; config.json does not belong to these weights"
                )
            model.set_submodule(name, StoredLinear(tensors, site.shape))
        reserve_tie(model, stored_to_model_names(model, headers, converted=True).values())
        matched = match_names(model, headers, converted=True)
        dtypes = {name: dtype for name, (dtype, _) in headers.items()}
        # What belongs to a packed layer is its format's to check.
        matched = {
            name: stored
            for name, stored in matched.items()
            if stored.rpartition(".")[0] not in layers or name.endswith(".bias")
        }
        check_dtypes(model, dtypes, matched, str(Path(checkpoint_files[0]).parent))

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        from llmq.activations.keys_values import quantize_kv
        from llmq.errors import LlmqError
        from llmq.formats.settings import format_of
        from llmq.formats.tables import is_table, put_tables
        from llmq.grid.spec import ActSpec
        from llmq.inference.module import QuantLinear

        settings = self.quantization_config.settings()
        fmt = format_of(settings)
        activations = ActSpec.from_json(settings.get("activations") or {})
        left_out: list[str] = []
        tables: dict[str, Any] = {}
        for name, module in list(model.named_modules()):
            if isinstance(module, StoredLinear) and module.has_weight:
                tensors = module.tensors()
                if any(tensor.is_meta for tensor in tensors.values()):
                    raise LlmqError(
                        f"{name}: its packed tensors are offloaded, which are buffers and stay in "
                        "memory; load without offload_buffers=True"
                    )
                bias = tensors.pop("bias", None)
                if bias is not None and not bias.is_floating_point():
                    raise LlmqError(
                        f"{name}.bias is stored as {bias.dtype}, expected real numbers; the "
                        "checkpoint is damaged"
                    )
                weight = (
                    None if module.replaced else fmt.dense(name, tensors, settings, module.shape)
                )
                if weight is not None:
                    model.set_submodule(name, _dense_layer(weight, bias, model.dtype))
                    continue
                config = fmt.tables.of_embeddings(settings) if module.replaced else settings
                qtensor = fmt.read(name, tensors, config, module.shape)
                qtensor.validate(name)
                unused = tensors.keys() - fmt.suffixes
                if activations.kind != "int8-static":
                    unused |= tensors.keys() & {"input_range"}
                left_out += [f"{name}.{suffix}" for suffix in unused]
                if is_table(model, module, head=fmt.is_own):
                    tables[name] = qtensor
                    continue
                if bias is not None:
                    bias = fmt.bias(bias, tensors, settings)
                inputs = fmt.activations_of(name, settings)
                model.set_submodule(name, QuantLinear(qtensor, bias, inputs, model.dtype))
        if fmt.is_online(settings):
            self._quantize_online(model, fmt, settings)
        put_tables(model, tables)
        quantize_kv(model, activations.kv_bits, before_rope=activations.kv_before_rope)
        self.left_out = tuple(sorted(left_out))
        if left_out:  # llmq.load, which silences transformers, says the same in its own way
            logging.get_logger(__name__).warning(
                "%d stored tensors of packed layers are not used, the first being %s",
                len(left_out),
                self.left_out[0],
            )
        _cast_as_built(model, self.built_dtypes)
        state_quantization(model, self)
        return model

    def update_weight_conversions(self, weight_conversions: Any, *args: Any) -> Any:
        """Experts are layers of their own here, so nothing is merged."""
        from llmq.models.compat import without_merges
        from llmq.models.experts import LAYERS_OF

        return without_merges(weight_conversions, LAYERS_OF)

    def _quantize_online(self, model: Any, fmt: Format, settings: dict[str, Any]) -> None:
        """Quantize the layers that transformers would, which are stored in full precision."""
        from llmq.inference.module import QuantLinear
        from llmq.models.compat import should_convert_module

        kept = self.get_modules_to_not_convert(
            model, settings.get("modules_to_not_convert"), model._keep_in_fp32_modules
        )
        for name, module in list(model.named_modules()):
            if isinstance(module, nn.Linear) and should_convert_module(name, kept):
                qtensor = fmt.from_weight(module.weight.detach())
                qtensor.validate(name)
                inputs = fmt.activations_of(name, settings)
                quantized = QuantLinear(qtensor, module.bias, inputs, model.dtype)
                model.set_submodule(name, quantized)

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """True: `get_state_dict_and_metadata` says of a model why it cannot be written."""
        return True

    def get_state_dict_and_metadata(
        self, model: Any, *args: Any, **kwargs: Any
    ) -> tuple[dict[str, Tensor] | None, dict[str, Any]]:
        """What `save_pretrained` writes: the tensors of the format that was loaded, and from now on
        its settings as the config. Raises `LlmqError`, with the way that there is, for a model that
        the format cannot hold."""
        from llmq.errors import LlmqError
        from llmq.formats.save import format_tensors

        if getattr(model, "_hf_peft_config_loaded", False):
            return None, {}  # the adapters alone are written
        if self.unsavable is not None:
            raise LlmqError(self.unsavable)
        if self.stored_format is None or self.stored_format.is_own:
            return None, {}
        tensors, self.quantization_config.written = format_tensors(model, self.stored_format.name)
        return tensors, {}

    @property
    def is_trainable(self) -> bool:
        """Adapters on quantized layers can be trained: the gradient goes through the quantized
        product. The layers themselves cannot, which `is_qat_trainable` says."""
        return True


def _cast_as_built(model: Any, dtypes: Mapping[str, torch.dtype]) -> None:
    """transformers leaves what it renames in a quantized checkpoint in the dtype that is stored
    (5.17): routers, towers. They get the model's; what it keeps in float32 is not cast down, and
    biases of packed layers stay as they are stored."""
    from llmq.inference.module import QuantLinear
    from llmq.models.compat import is_kept_in_float32

    packed = {name for name, module in model.named_modules() if isinstance(module, QuantLinear)}
    for name, parameter in model.named_parameters():
        dtype = dtypes.get(name, parameter.dtype)
        if parameter.is_meta or parameter.dtype == dtype or name.rpartition(".")[0] in packed:
            continue
        if dtype == torch.float32 or not is_kept_in_float32(model, name):
            parameter.data = parameter.data.to(dtype)


def _dense_layer(weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> nn.Linear:
    """A layer in full precision. weight: `[N, K]`."""
    n, k = weight.shape
    with torch.device("meta"):
        layer = nn.Linear(k, n, bias=bias is not None)
    layer.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.to(dtype), requires_grad=False)
    return layer


def state_quantization(model: Any, quantizer: LlmqQuantizer | None = None) -> None:
    """Have a model with quantized layers in memory say so, as transformers expects it: what
    `save_pretrained` writes then loads as what it is. In memory every format is the native one."""
    from llmq.formats.native import NATIVE
    from llmq.inference.embedding import quantized_tables
    from llmq.inference.module import quantized_modules
    from llmq.models.compat import conversions, set_conversions, without_merges
    from llmq.models.experts import LAYERS_OF
    from llmq.models.site import sites_in

    layers = quantized_modules(model)
    head = model.get_output_embeddings()
    # Inputs of a head are not quantized, whatever those of layers are.
    of_head = [module for module in layers.values() if module is head]
    inside = [module for module in layers.values() if module is not head]
    activations = {module.activations for module in inside or of_head}
    # What is linear still is kept as it is, whether or not a config says so: GPTQ's has no list of
    # such layers.
    specs: dict[str, Any] = {site.name: None for site in sites_in(model) if site.module is not head}
    specs |= {name: module.spec for name, module in layers.items() if module is not head}
    settings = NATIVE.tables.stated(
        NATIVE.write_config(specs),
        {name: (role, table.spec) for name, (role, table) in quantized_tables(model).items()},
    )
    if len(activations) == 1:
        settings["activations"] = next(iter(activations)).to_json()
    config = LlmqConfig(**settings)
    if quantizer is None:
        quantizer = LlmqQuantizer(config, pre_quantized=True)
        set_conversions(model, without_merges(conversions(model), LAYERS_OF))
        model.hf_quantizer = quantizer
        model.quantization_method = METHOD
    if len(activations) > 1:
        quantizer.unsavable = (
            "the layers of this model quantize their inputs in different ways, which no format "
            "holds; give all the same ActSpec"
        )
    quantizer.quantization_config = config
    model.config.quantization_config = config
