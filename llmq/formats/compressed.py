"""The compressed-tensors format, as llm-compressor writes it and vLLM, SGLang and transformers read
it.

    pack-quantized   weight_packed int32 [N, ceil(K * bits / 32)], the canonical words
                     weight_zero_point int32 [ceil(N * bits / 32), G], packed along N
                     weight_shape int64 [2]
    int-quantized    weight int8 [N, K], the code less 2^(bits - 1); weight_zero_point int8 [N, G]
    both             weight_scale [N, G], [N, 1] per row, [1] per tensor; weight_g_idx int32 [K]
                     input_scale float32 [1], input_zero_point int8 [1] of static activations

What floats are stored in 8 or 4 bits is read into full precision (`compressed_floats.py`)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from llmq.errors import LlmqError
from llmq.formats import compressed_floats as floats
from llmq.formats import compressed_settings as stated
from llmq.formats.base import OWN_METHOD, Format, Settings, Specs, TableRules, Tables
from llmq.formats.compressed_settings import INTEGERS, METHOD, WeightArgs
from llmq.grid.spec import PER_ROW, PER_TENSOR, ActSpec, QuantSpec
from llmq.grid.tensor import QuantizedTensor
from llmq.models.outside import HEAD
from llmq_kernels.core.packing import WORD_BITS, pack, packed_width, unpack

_DTYPE_NAMES = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "float32"}
_MIDDLE = 128  # what is between a static zero point of llmq (0 .. 255) and a stored one


def _refusal(spec: QuantSpec, shape: tuple[int, int]) -> str | None:
    """Of a layer, or of a head."""
    if spec.code == "ternary":
        return "it has no ternary codes"
    if spec.levels.offset % 1:
        return "it has whole zero points only"
    if shape[1] % spec.columns_per_group(shape[1]):
        return f"it needs K divisible by the group size, not {shape[1]}"
    return None


class CompressedTables(TableRules):
    """A head of its own, as one more group. Embeddings are read, and not written."""

    def refusal(self, role: str, spec: QuantSpec, shape: tuple[int, int]) -> str | None:
        if role == HEAD:
            return _refusal(spec, shape)
        return (
            f"transformers and vLLM without a GPU do not look up packed rows ({role}), and neither "
            "ties a head to them"
        )

    def stated(self, config: Settings, tables: Tables) -> Settings:
        for name, (_, spec) in tables.items():
            config = stated.with_head(config, name, spec)
        return config

    def of_embeddings(self, config: Settings) -> Settings:
        return stated.of_embeddings(config)


class CompressedTensors(Format):
    """activations: what a folder is written for. It decides how 8-bit weights are stored, and
    stands in the settings of every group."""

    name = METHOD
    marker = "weight_scale"
    suffixes = frozenset(
        {
            *("weight_packed", "weight", "weight_shape", "weight_scale", "weight_zero_point"),
            *("weight_g_idx", "weight_global_scale", "input_global_scale"),
            *("input_scale", "input_zero_point"),
        }
    )
    quant_method = METHOD
    has_order = False
    has_columns = False
    tables = CompressedTables()

    def __init__(self, activations: ActSpec = ActSpec()) -> None:
        self.activations: ActSpec = activations

    def given(self, activations: ActSpec) -> Format:
        return self if activations == self.activations else CompressedTensors(activations)

    def refusal(self, spec: QuantSpec, shape: tuple[int, int]) -> str | None:
        return _refusal(spec, shape)

    def refusal_of_activations(self, activations: ActSpec) -> str | None:
        if activations.kv_bits is None:
            return None
        return (
            "its KV-cache scheme is one stored scale per layer, and llmq quantizes keys and values "
            "by every head of every token"
        )

    def is_first_choice(self, specs: Specs) -> bool:
        return True

    def write(self, qtensor: QuantizedTensor) -> dict[str, Tensor]:
        if qtensor.g_idx is not None:
            raise LlmqError(
                "compressed-tensors holds no order of columns (act-order) that its readers still "
                "load; write --format gptq or llmq, or quantize without --act-order"
            )
        spec, zero = qtensor.spec, qtensor.zero
        is_whole = spec.group_size == PER_TENSOR
        stored = {"weight_scale": qtensor.scale.view(1) if is_whole else qtensor.scale}
        if stated.layout_of(spec, self.activations) == INTEGERS:
            stored["weight"] = _signed(qtensor.codes(), spec.bits)
        else:
            stored["weight_packed"] = qtensor.packed
            stored["weight_shape"] = torch.tensor(qtensor.shape)
        if zero is not None and ("weight" in stored or is_whole):
            stored["weight_zero_point"] = _signed(
                zero.view(stored["weight_scale"].shape), spec.bits
            )
        elif zero is not None:
            stored["weight_zero_point"] = pack(zero.T.contiguous(), spec.bits).T.contiguous()
        if qtensor.input_range is not None:
            scale, middle = qtensor.input_range[:1], qtensor.input_range[1:]
            stored["input_scale"] = scale.clone()
            stored["input_zero_point"] = (middle - _MIDDLE).to(torch.int8)
        return stored

    def read(
        self, name: str, tensors: dict[str, Tensor], config: Settings, shape: tuple[int, int]
    ) -> QuantizedTensor:
        args = stated.weight_args(name, config)
        scale = _scale(name, tensors, args, shape)
        spec = QuantSpec(
            f"int{args.bits}",
            args.group_size,
            symmetric=args.symmetric,
            scale_dtype=_DTYPE_NAMES[scale.dtype],  # type: ignore[arg-type]
        )
        qtensor = QuantizedTensor(
            _packed(name, tensors, args.bits, shape),
            scale,
            _zero_point(name, tensors, args, shape),
            spec,
            shape,
            _order(name, tensors.get("weight_g_idx"), spec, shape[1]),
        )
        if stated.activations_of(name, config).kind != "int8-static":
            return qtensor
        return replace(qtensor, input_range=_input_range(name, tensors))

    def stated_spec(self, name: str, config: Settings) -> QuantSpec | None:
        args = stated.weight_args(name, config)
        if args.kind != "int":
            return None
        return QuantSpec(f"int{args.bits}", args.group_size, symmetric=args.symmetric)

    def dense(
        self, name: str, tensors: dict[str, Tensor], config: Settings, shape: tuple[int, int]
    ) -> Tensor | None:
        args = stated.weight_args(name, config)
        return None if args.kind == "int" else floats.decode(name, tensors, args, shape)

    def activations_of(self, name: str, config: Settings) -> ActSpec:
        return stated.activations_of(name, config)

    def write_config(self, specs: Specs, *, act_order: bool = False) -> Settings:
        return stated.write_groups(specs, self.activations)

    def with_kept(
        self, config: Settings, names: Collection[str], quantized: Collection[str] = ()
    ) -> Settings:
        return stated.with_ignored(config, names)

    def with_names(self, config: Settings, stored: Mapping[str, str]) -> Settings:
        return stated.with_names(config, stored)

    def read_config(self, settings: Settings) -> Settings:
        own = {"quant_method": OWN_METHOD, "format": self.name, "layout": settings.get("format")}
        return self.check_read({**settings, **own})

    def check_read(self, config: Settings) -> Settings:
        stated.check_settings(config)
        return config

    def remarks(self, config: Settings, stored: Mapping[str, str]) -> list[str]:
        kinds = Counter(_float_kinds(stored))
        found = [
            f"{count} layers of {kind}, for which llmq has no kernel, are run in full precision"
            for kind, count in kinds.items()
        ]
        return [*found, *stated.unlike(config)]


COMPRESSED = CompressedTensors()


def _float_kinds(stored: Mapping[str, str]) -> list[str]:
    """What the layers are called that hold floats. stored: dtypes by name, as safetensors calls
    them."""
    found = []
    for name, dtype in stored.items():
        layer, _, suffix = name.rpartition(".")
        has_exponents = stored.get(f"{layer}.weight_scale") in ("U8", "F8_E8M0")
        if suffix == "weight" and dtype == "F8_E4M3":
            found.append("MXFP8" if has_exponents else "FP8")
        elif suffix == "weight_packed" and dtype == "U8":
            found.append("MXFP4" if has_exponents else "NVFP4")
    return found


def _signed(codes: Tensor, bits: int) -> Tensor:
    """int8 of unsigned codes."""
    return (codes.to(torch.int16) - (1 << (bits - 1))).to(torch.int8)


def _unsigned(values: Tensor, bits: int) -> Tensor:
    """The inverse of `_signed`."""
    return (values.to(torch.int16) + (1 << (bits - 1))).to(torch.uint8)


def _scale(
    name: str, tensors: dict[str, Tensor], args: WeightArgs, shape: tuple[int, int]
) -> Tensor:
    """`[N, G]`, or `[1, 1]` per tensor."""
    scale = tensors["weight_scale"]
    if scale.dtype not in _DTYPE_NAMES:
        raise _damaged(f"{name}.weight_scale", scale, "real numbers", None)
    expected = _grid(args, shape)
    if scale.numel() == expected[0] * expected[1] and (scale.ndim == 1 or args.group_size == 0):
        scale = scale.reshape(expected)
    if tuple(scale.shape) != expected:
        raise _damaged(f"{name}.weight_scale", scale, "real numbers", expected)
    return scale.contiguous()


def _grid(args: WeightArgs, shape: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of the scales."""
    n, k = shape
    if args.group_size == PER_TENSOR:
        return 1, 1
    return n, 1 if args.group_size == PER_ROW else -(-k // args.group_size)


def _packed(name: str, tensors: dict[str, Tensor], bits: int, shape: tuple[int, int]) -> Tensor:
    """The canonical words, from either layout."""
    n, k = shape
    if "weight_packed" not in tensors:
        weight = tensors.get("weight")
        if weight is None:
            raise LlmqError(f"{name}: tensor weight_packed is missing; the checkpoint is damaged")
        if weight.dtype != torch.int8 or tuple(weight.shape) != shape:
            raise _damaged(f"{name}.weight", weight, "torch.int8", shape)
        codes = _unsigned(weight, bits)
        if bits < 8 and int(codes.max()) >> bits:
            raise LlmqError(
                f"{name}.weight: holds values that {bits} bits do not have; the checkpoint is "
                "damaged"
            )
        return pack(codes, bits)
    packed, stored_shape = tensors["weight_packed"], tensors.get("weight_shape")
    if stored_shape is not None and tuple(stored_shape.reshape(-1).tolist()) != shape:
        raise LlmqError(
            f"{name}.weight_shape: says {stored_shape.tolist()}, expected {list(shape)}; "
            "config.json does not belong to these weights"
        )
    if packed.dtype == torch.int32:
        if tuple(packed.shape) == (n, packed_width(k, bits)):
            return packed
        per_word = WORD_BITS // bits  # where no code of 3, 5 or 6 bits goes over two words
        if tuple(packed.shape) == (n, -(-k // per_word)):
            lanes = [packed >> bits * i & (1 << bits) - 1 for i in range(per_word)]
            return pack(torch.stack(lanes, -1).view(n, -1)[:, :k], bits)
    raise _damaged(f"{name}.weight_packed", packed, "torch.int32", (n, packed_width(k, bits)))


def _zero_point(
    name: str, tensors: dict[str, Tensor], args: WeightArgs, shape: tuple[int, int]
) -> Tensor | None:
    """uint8 `[N, G]` (`[1, 1]` per tensor), None where the middle is the zero point."""
    stored, bits = tensors.get("weight_zero_point"), args.bits
    if args.symmetric:
        if stored is not None and bool(stored.any()) and stored.dtype != torch.int32:
            raise LlmqError(
                f"{name}.weight_zero_point: holds values other than 0, but the config says "
                "symmetric; the checkpoint is damaged"
            )
        return None
    if stored is None:
        raise LlmqError(f"{name}: tensor weight_zero_point is missing; the checkpoint is damaged")
    n, n_groups = _grid(args, shape)
    if stored.dtype == torch.int32:
        if tuple(stored.shape) != (packed_width(n, bits), n_groups):
            expected = (packed_width(n, bits), n_groups)
            raise _damaged(f"{name}.weight_zero_point", stored, "torch.int32", expected)
        return unpack(stored.T.contiguous(), bits, n).T.contiguous()
    if stored.dtype != torch.int8 or stored.numel() != n * n_groups:
        raise _damaged(f"{name}.weight_zero_point", stored, "torch.int8", (n, n_groups))
    return _unsigned(stored.reshape(n, n_groups), bits).contiguous()


def _order(name: str, g_idx: Tensor | None, spec: QuantSpec, k: int) -> Tensor | None:
    """The group of each column, where it says more than the group size does. Values of -1 are how
    llm-compressor says that it gave no order."""
    if g_idx is None or not g_idx.numel() or bool((g_idx == -1).all()):
        return None
    if g_idx.dtype not in (torch.int32, torch.int64) or tuple(g_idx.shape) != (k,):
        raise _damaged(f"{name}.weight_g_idx", g_idx, "torch.int32", (k,))
    plain = torch.arange(k, device=g_idx.device) // spec.columns_per_group(k)
    return None if torch.equal(g_idx.long(), plain) else g_idx.to(torch.int32)


def _input_range(name: str, tensors: dict[str, Tensor]) -> Tensor:
    """Scale and zero point (0 .. 255) of a layer's input, float32 `[2]`."""
    scale, zero = tensors.get("input_scale"), tensors.get("input_zero_point")
    if scale is None or scale.numel() != 1 or not scale.is_floating_point():
        raise LlmqError(
            f"{name}.input_scale: expected one real number, "
            f"{'which is missing' if scale is None else f'got {scale.dtype} of {scale.numel()}'}; "
            "the checkpoint is damaged"
        )
    if not float(scale.reshape(())) > 0 or not bool(torch.isfinite(scale).all()):
        raise LlmqError(
            f"{name}.input_scale: {float(scale.reshape(()))} is no scale; the checkpoint is damaged"
        )
    if zero is not None and (zero.numel() != 1 or zero.dtype != torch.int8):
        raise _damaged(f"{name}.input_zero_point", zero, "torch.int8", (1,))
    middle = torch.zeros(1, device=scale.device) if zero is None else zero.view(1).float()
    return torch.cat((scale.view(1).float(), middle + _MIDDLE))


def _damaged(what: str, tensor: Tensor, dtype: str, shape: tuple[int, ...] | None) -> LlmqError:
    where = "" if shape is None else f" of shape {list(shape)}"
    return LlmqError(
        f"{what}: expected {dtype}{where}, got {tensor.dtype} of shape {list(tensor.shape)}; the "
        "checkpoint is damaged"
    )
