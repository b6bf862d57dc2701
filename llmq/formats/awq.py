"""The GEMM layout of AWQ: 4 bits with a zero point per group, as AutoAWQ wrote it and vLLM, SGLang
and transformers (with gptqmodel) read it. Whatever method found the codes, the layout holds them.

    qweight int32 [K, N / 8]   8 rows of the weight to a word, in the order of `_ORDER`
    qzeros  int32 [G, N / 8]   zero points, packed alike, stored as they are
    scales  float16 [G, N]

No tensor says which group a column belongs to, so columns in another order (act-order) cannot be
stored; and the config has one group size for all layers."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from llmq.errors import LlmqError
from llmq.formats.base import OWN_METHOD, Format, Settings, Specs
from llmq.formats.engine_names import alike_experts, both
from llmq.formats.gptq_settings import AUTO_ROUND, AUTO_ROUND_AWQ, KEPT_BITS, check_auto_round
from llmq.formats.setting_types import is_whole, wrong
from llmq.grid.spec import PER_ROW, PER_TENSOR, QuantSpec
from llmq.grid.tensor import QuantizedTensor
from llmq_kernels.core.packing import pack, unpack

BITS = 4
_MIDDLE = 1 << (BITS - 1)  # the zero point of a symmetric layer
_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # nibble i of a word holds row _ORDER[i] of its 8
_VERSION = "gemm"
_SUFFIXES = frozenset({"qweight", "qzeros", "scales"})


class Awq(Format):
    """Asked for by name: the way of asymmetric 4-bit weights to other engines."""

    name = "awq"
    marker = "qweight"
    suffixes = _SUFFIXES
    stores_middle = True
    quant_method = "awq"
    has_order = False
    one_group_size = True

    def refusal(self, spec: QuantSpec, shape: tuple[int, int]) -> str | None:
        n, k = shape
        if spec.code != "int4":
            return "it holds codes of 4 bits with whole zero points only"
        if spec.group_size == PER_TENSOR:
            return "it has no scale per tensor"
        if spec.scale_dtype != "float16":
            return f"its scales are float16, not {spec.scale_dtype}"
        if n % len(_ORDER) or k % spec.columns_per_group(k):
            return f"it needs N divisible by 8 and K by the group size, not {n} x {k}"
        return None

    def refusal_of_model(self, specs: Specs) -> str | None:
        sizes = {spec.group_size for spec in specs.values() if spec is not None}
        if len(sizes) > 1:
            return f"it has one group size for all layers, not {', '.join(map(str, sorted(sizes)))}"
        return None

    def stated_spec(self, name: str, config: Settings) -> QuantSpec | None:
        return QuantSpec(f"int{BITS}", int(config.get("group_size", PER_ROW)), symmetric=False)

    def write(self, qtensor: QuantizedTensor) -> dict[str, Tensor]:
        if qtensor.g_idx is not None:
            raise LlmqError(
                "AWQ stores no order of columns (act-order); write --format gptq or llmq, or "
                "quantize without --act-order"
            )
        zero = qtensor.zero
        if zero is None:
            zero = torch.full_like(qtensor.scale, _MIDDLE, dtype=torch.uint8)
        return {
            "qweight": _pack_rows(qtensor.codes()),
            "qzeros": _pack_rows(zero),
            "scales": qtensor.scale.T.contiguous(),
        }

    def read(
        self, name: str, tensors: dict[str, Tensor], config: Settings, shape: tuple[int, int]
    ) -> QuantizedTensor:
        _check_tensors(name, tensors, int(config.get("group_size", -1)), shape)
        scale = tensors["scales"].T.contiguous()
        zero = _unpack_rows(tensors["qzeros"])
        spec = QuantSpec(
            f"int{BITS}",
            PER_ROW if scale.shape[1] == 1 else shape[1] // scale.shape[1],
            symmetric=bool((zero == _MIDDLE).all()),
        )
        codes = _unpack_rows(tensors["qweight"])
        return QuantizedTensor.from_codes(codes, scale, None if spec.symmetric else zero, spec)

    def write_config(self, specs: Specs, *, act_order: bool = False) -> Settings:
        quantized = [spec for spec in specs.values() if spec is not None]
        kept = [name for name, spec in specs.items() if spec is None]
        modules = [name for name, spec in alike_experts(specs).items() if spec is None]
        return {
            "quant_method": self.quant_method,
            "version": _VERSION,
            "bits": BITS,
            "group_size": quantized[0].group_size if quantized else PER_ROW,
            "zero_point": True,
            "modules_to_not_convert": [*kept, *modules],
        }

    def with_names(self, config: Settings, stored: Mapping[str, str]) -> Settings:
        return {
            **config,
            "modules_to_not_convert": both(config["modules_to_not_convert"], stored),
        }

    def detects(self, settings: Settings) -> bool:
        if settings.get("quant_method") == AUTO_ROUND:
            return settings.get("packing_format") == AUTO_ROUND_AWQ
        return super().detects(settings)

    def read_config(self, settings: Settings) -> Settings:
        if settings.get("quant_method") == AUTO_ROUND:
            settings = _from_auto_round(settings)
        version = str(settings.get("version", _VERSION)).lower()
        if version != _VERSION:
            raise LlmqError(
                f"AWQ folder of version {version!r}: llmq reads the layout {_VERSION!r}; quantize "
                "the original model with llmq instead"
            )
        where, group_size = "quantization_config", settings.get("group_size", 0)
        if settings.get("bits") != BITS:
            raise wrong(f"{where}: bits", settings.get("bits"), f"{BITS}, which AWQ has alone")
        if not is_whole(group_size) or not (group_size == PER_ROW or group_size > 1):
            raise wrong(f"{where}: group_size", group_size, "-1 or a whole number above 1")
        if settings.get("zero_point") is not True:
            raise wrong(f"{where}: zero_point", settings.get("zero_point"), "true")
        return {**settings, "quant_method": OWN_METHOD, "format": self.name}


AWQ = Awq()


def _from_auto_round(settings: Settings) -> Settings:
    """AutoRound's settings of this layout as AutoAWQ would have them: zero points are stored for
    symmetric layers, too, and layers that differ are kept, since the layout has one width."""
    for name, overrides in check_auto_round(settings).items():
        for key in ("bits", "group_size"):
            value, common = overrides.get(key), settings.get(key)
            is_kept = is_whole(overrides.get("bits")) and overrides["bits"] >= KEPT_BITS
            if value is not None and value != common and not is_kept:
                raise wrong(
                    f"quantization_config: extra_config[{name!r}]: {key}", value, str(common)
                )
    return {**settings, "zero_point": True, "version": _VERSION}


def _pack_rows(codes: Tensor) -> Tensor:
    """int32 `[K, N / 8]` of uint8 codes `[N, K]`."""
    n, k = codes.shape
    words = codes.T.reshape(k, n // len(_ORDER), len(_ORDER))[:, :, list(_ORDER)]
    return pack(words.reshape(k, n), BITS)


def _unpack_rows(packed: Tensor) -> Tensor:
    """The inverse of `_pack_rows`."""
    k, n = packed.shape[0], packed.shape[1] * len(_ORDER)
    nibbles = unpack(packed, BITS, n).view(k, -1, len(_ORDER))
    rows = torch.empty_like(nibbles)
    rows[:, :, list(_ORDER)] = nibbles
    return rows.view(k, n).T.contiguous()


def _check_tensors(
    name: str, tensors: dict[str, Tensor], group_size: int, shape: tuple[int, int]
) -> None:
    """Raise `LlmqError` for tensors that are not those of a weight of this shape."""
    if missing := _SUFFIXES - tensors.keys():
        raise LlmqError(f"{name}: tensor {min(missing)} is missing; the checkpoint is damaged")
    n, k = shape
    n_groups = 1 if group_size == PER_ROW else k // group_size
    n_words = n // len(_ORDER)
    expected = {
        "qweight": (torch.int32, (k, n_words)),
        "qzeros": (torch.int32, (n_groups, n_words)),
        "scales": (torch.float16, (n_groups, n)),
    }
    for suffix, (dtype, size) in expected.items():
        tensor = tensors[suffix]
        if tensor.dtype != dtype or tuple(tensor.shape) != size:
            raise LlmqError(
                f"{name}.{suffix}: expected {dtype} of shape {list(size)} for a weight of {n} x "
                f"{k}, got {tensor.dtype} of shape {list(tensor.shape)}; the checkpoint is damaged"
            )
