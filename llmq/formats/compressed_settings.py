"""What config.json says of a compressed-tensors folder: groups of layers, how the weights of each
are quantized and how its inputs are, and which group a layer belongs to.

A group names its layers by `targets`: names of modules, regular expressions after `re:`, or the
class "Linear" for all that are left; the most specific decides, and `ignore` takes layers out
(github.com/vllm-project/compressed-tensors, quantization/quant_args.py and utils/match.py)."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from llmq import patterns
from llmq.errors import LlmqError
from llmq.formats.base import Settings, Specs
from llmq.formats.engine_names import both
from llmq.formats.setting_types import MAX_PATTERNS, is_whole, wrong
from llmq.grid.spec import PER_ROW, PER_TENSOR, ActSpec, QuantSpec

METHOD = "compressed-tensors"
PACKED, INTEGERS, MIXED = "pack-quantized", "int-quantized", "mixed-precision"
BITS = (2, 3, 4, 5, 6, 8)
_FLOAT_BITS = (4, 8)
_STRATEGIES = ("tensor", "channel", "group", "tensor_group", "block")
_LAYOUTS = (
    *(PACKED, INTEGERS, MIXED, "naive-quantized", "float-quantized"),
    *("nvfp4-pack-quantized", "mxfp4-pack-quantized", "mxfp8-quantized"),
)
_DENSE = ("dense", None)
_CLASS, _EMBEDDING_CLASS = "Linear", "Embedding"
_REGEX = "re:"
_WHERE = "quantization_config"
_INSTEAD = "quantize the original model with llmq instead"


@dataclass(frozen=True)
class WeightArgs:
    """How the weights of a group are stored. kind: "int" or "float". group_size: columns that share
    a scale, as in `QuantSpec`. block: rows and columns that share one, or None."""

    kind: str
    bits: int
    symmetric: bool
    group_size: int
    block: tuple[int, int] | None = None


def group_of(name: str, config: Settings) -> Settings:
    """The group of a layer that is stored quantized. Raises `LlmqError` where there is none."""
    groups = list(_groups(config))
    by_target = {target: group for _, group in groups for target in group["targets"]}
    if name in by_target:
        return by_target[name]
    for target, group in sorted(by_target.items(), key=lambda each: each[0]):
        if target.startswith(_REGEX) and patterns.matches(
            target.removeprefix(_REGEX), name, f"{_WHERE}: targets"
        ):
            return group
    if _CLASS in by_target:
        return by_target[_CLASS]
    if (
        len(groups) == 1 and groups[0][1]["targets"]
    ):  # under another name of the same module, as in a wrapper of several models
        return groups[0][1]
    raise LlmqError(
        f"{_WHERE}: {name} is stored quantized, but no target of config_groups is about it; the "
        "config does not belong to these weights"
    )


def weight_args(name: str, config: Settings) -> WeightArgs:
    """How the weight of a layer is stored."""
    return _weight_args(group_of(name, config))


def activations_of(name: str, config: Settings) -> ActSpec:
    """How llmq quantizes the inputs of a layer: as the config says, or not at all."""
    return _activations(group_of(name, config)) or ActSpec()


def check_settings(settings: Settings) -> None:
    """Raise `LlmqError` for settings that would be read wrongly. layout: what stands under `format`
    in the folder."""
    layout = settings.get("layout")
    if layout not in _LAYOUTS:
        raise LlmqError(
            f"compressed-tensors folder of format {layout!r}: llmq reads {', '.join(_LAYOUTS)}; "
            f"{_INSTEAD}"
        )
    status = settings.get("quantization_status", "compressed")
    if status not in ("compressed", "frozen"):
        raise wrong(f"{_WHERE}: quantization_status", status, "'compressed'")
    for key in ("sparsity_config", "transform_config"):
        _check_absent(key, settings.get(key))
    groups = settings.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise wrong(f"{_WHERE}: config_groups", groups, "an object of groups")
    for name, group in groups.items():
        _check_group(f"{_WHERE}: config_groups[{name!r}]", group)
    scheme = settings.get("kv_cache_scheme")
    if not isinstance(scheme, dict | None):
        raise wrong(f"{_WHERE}: kv_cache_scheme", scheme, "an object or null")


def unlike(settings: Settings) -> list[str]:
    """What a folder asks for beside its weights that llmq does not do, in words."""
    found = []
    for _, group in _groups(settings):
        if _activations(group) is None:
            args = group["input_activations"]
            kind = f"{args.get('num_bits')}-bit {args.get('type')}"
            how = "dynamic" if args.get("dynamic") else "static"
            found.append(
                f"inputs are not quantized where it asks for {kind}, {args.get('strategy')}, {how}"
            )
    if (scheme := settings.get("kv_cache_scheme")) is not None:
        kind = f"{scheme.get('num_bits')}-bit {scheme.get('type')}"
        found.append(f"keys and values are not quantized where it asks for {kind}")
    return list(dict.fromkeys(found))


def write_groups(specs: Specs, activations: ActSpec) -> Settings:
    """The part of a `quantization_config` that says what each layer is."""
    layers: dict[QuantSpec, list[str]] = {}
    for name, spec in specs.items():
        if spec is not None:  # in which dtype scales are stored is no part of a group
            layers.setdefault(replace(spec, scale_dtype="float16"), []).append(name)
    groups = {
        f"group_{i}": {
            "targets": names if len(layers) > 1 else [_CLASS],
            "weights": _written_weights(spec),
            "input_activations": _written_activations(activations),
            "output_activations": None,
            "format": layout_of(spec, activations),
        }
        for i, (spec, names) in enumerate(layers.items())
    }
    return {
        "quant_method": METHOD,
        "format": _layout_of_all(groups),
        "quantization_status": "compressed",
        "config_groups": groups,
        "kv_cache_scheme": None,
        "ignore": [name for name, spec in specs.items() if spec is None],
    }


def with_head(config: Settings, name: str, spec: QuantSpec) -> Settings:
    """The settings with an output head that is quantized, its inputs not."""
    head = {
        "targets": [name],
        "weights": _written_weights(spec),
        "input_activations": None,
        "output_activations": None,
        "format": PACKED,
    }
    groups = {**config["config_groups"], f"group_{len(config['config_groups'])}": head}
    return {**config, "format": _layout_of_all(groups), "config_groups": groups}


def of_embeddings(config: Settings) -> Settings:
    """The settings as they are about embeddings: targets that name a class mean theirs."""
    groups = {}
    for name, group in _groups(config):
        targets = [each for each in group["targets"] if each != _CLASS]
        renamed = [_CLASS if each == _EMBEDDING_CLASS else each for each in targets]
        groups[name] = {**group, "targets": renamed}
    return {**config, "config_groups": groups}


def _layout_of_all(groups: Settings) -> str:
    layouts = {group["format"] for group in groups.values()}
    return layouts.pop() if len(layouts) == 1 else MIXED


def with_ignored(config: Settings, names: Collection[str]) -> Settings:
    """The settings with more modules that are not quantized."""
    return {**config, "ignore": list(dict.fromkeys([*config["ignore"], *names]))}


def with_names(config: Settings, stored: Mapping[str, str]) -> Settings:
    """The settings with the names that layers are stored under beside those of the model."""
    groups = {
        key: {**group, "targets": both(group["targets"], stored)}
        for key, group in config["config_groups"].items()
    }
    return {**config, "config_groups": groups, "ignore": both(config["ignore"], stored)}


def layout_of(spec: QuantSpec, activations: ActSpec) -> str:
    """How a weight is stored: 8 bits for integer products as they are, all else in words."""
    is_whole_byte = spec.bits == 8 and activations.kind != "none"
    return INTEGERS if is_whole_byte else PACKED


def _written_weights(spec: QuantSpec) -> Settings:
    args: Settings = {
        "num_bits": spec.bits,
        "type": "int",
        "symmetric": spec.symmetric,
        "strategy": {PER_ROW: "channel", PER_TENSOR: "tensor"}.get(spec.group_size, "group"),
        "dynamic": False,
    }
    return {**args, "group_size": spec.group_size} if spec.group_size > 0 else args


def _written_activations(activations: ActSpec) -> Settings | None:
    if activations.kind == "none":
        return None
    is_dynamic = activations.kind == "int8-token"
    return {
        "num_bits": 8,
        "type": "int",
        "symmetric": is_dynamic,
        "strategy": "token" if is_dynamic else "tensor",
        "dynamic": is_dynamic,
    }


def _groups(config: Settings) -> Iterator[tuple[str, Settings]]:
    """The groups that have quantized weights, by name."""
    for name, group in config["config_groups"].items():
        if group.get("weights") is not None:
            yield name, group


def _activations(group: Settings) -> ActSpec | None:
    """How inputs are quantized; None: in a way that llmq has not."""
    args = group.get("input_activations")
    if args is None:
        return ActSpec()
    if (args.get("type", "int"), args.get("num_bits", 8)) != ("int", 8):
        return None
    strategy, is_dynamic = args.get("strategy"), args.get("dynamic", False)
    if strategy == "token" and is_dynamic is True and args.get("symmetric", True):
        return ActSpec("int8-token")
    if strategy == "tensor" and is_dynamic is False:
        return ActSpec("int8-static")
    return None


def _weight_args(group: Settings) -> WeightArgs:
    args = group["weights"]
    strategy = _strategy(args)
    columns = {"channel": PER_ROW, "tensor": PER_TENSOR, "block": PER_TENSOR}
    return WeightArgs(
        kind=args.get("type", "int"),
        bits=args.get("num_bits", 8),
        symmetric=args.get("symmetric", True),
        group_size=columns[strategy] if strategy in columns else args["group_size"],
        block=tuple(_block_of(args)) if strategy == "block" else None,  # type: ignore[arg-type]
    )


def _block_of(args: Settings) -> Any:
    """Rows and columns of a block, which may be a text such as "128x128"."""
    stated = args.get("block_structure")
    if isinstance(stated, str) and re.fullmatch(r"\d{1,9}x\d{1,9}", stated):
        return [int(part) for part in stated.split("x")]
    return stated


def _strategy(args: Settings) -> str:
    """The stated strategy, or the one that follows from the group size."""
    stated, group_size = args.get("strategy"), args.get("group_size")
    if stated is not None:
        return str(stated)
    if group_size is None:
        return "tensor"
    return "group" if group_size > 0 else "channel"


def _check_absent(key: str, value: Any) -> None:
    """That a folder is neither sparse nor transformed."""
    layout = value.get("format") if isinstance(value, dict) else None
    is_absent = not value or (key == "sparsity_config" and layout in _DENSE)
    if not is_absent:
        what = "is pruned" if key == "sparsity_config" else "rotates its weights"
        raise LlmqError(
            f"{_WHERE}: {key}: this folder {what} beside being quantized, which llmq does not "
            f"read; {_INSTEAD}"
        )


def _check_group(where: str, group: Any) -> None:
    if not isinstance(group, dict):
        raise wrong(where, group, "an object")
    targets = group.get("targets")
    if not isinstance(targets, list) or not all(isinstance(each, str) for each in targets):
        raise wrong(f"{where}: targets", targets, "a list of names of modules")
    if len(targets) > MAX_PATTERNS:
        raise wrong(f"{where}: targets", len(targets), f"at most {MAX_PATTERNS} names")
    for target in targets:
        if target.startswith(_REGEX):
            patterns.check(target.removeprefix(_REGEX), f"{where}: targets")
    for part in ("weights", "input_activations", "output_activations"):
        if not isinstance(group.get(part), dict | None):
            raise wrong(f"{where}: {part}", group[part], "an object or null")
    if group.get("output_activations") is not None:
        raise LlmqError(
            f"{where}: output_activations: the outputs of layers are quantized in this folder, "
            f"which llmq does not do; {_INSTEAD}"
        )
    if group.get("weights") is not None:
        _check_weights(f"{where}: weights", group["weights"])


def _check_weights(where: str, args: Settings) -> None:
    """The values that decide how a weight is read."""
    kind, bits = args.get("type", "int"), args.get("num_bits", 8)
    if kind not in ("int", "float"):
        raise wrong(f"{where}: type", kind, "'int' or 'float'")
    known = BITS if kind == "int" else _FLOAT_BITS
    if not is_whole(bits) or bits not in known:
        raise wrong(f"{where}: num_bits", bits, f"one of {', '.join(map(str, known))}")
    symmetric = args.get("symmetric", True)
    if not isinstance(symmetric, bool) or (kind == "float" and not symmetric):
        raise wrong(f"{where}: symmetric", symmetric, "true, or false for whole numbers")
    if args.get("dynamic", False) is not False:
        raise wrong(f"{where}: dynamic", args["dynamic"], "false for weights")
    group_size = args.get("group_size")
    if group_size is not None and not (is_whole(group_size) and group_size >= PER_ROW):
        raise wrong(f"{where}: group_size", group_size, "a whole number or null")
    strategy = _strategy(args)
    if strategy not in _STRATEGIES:
        raise wrong(f"{where}: strategy", strategy, f"one of {', '.join(_STRATEGIES)}")
    if strategy in ("group", "tensor_group") and (group_size is None or group_size < 2):
        raise wrong(f"{where}: group_size", group_size, f"a number above 1 for {strategy}")
    if strategy == "block":
        _check_block(where, kind, _block_of(args))


def _check_block(where: str, kind: str, block: Any) -> None:
    is_pair = isinstance(block, list) and len(block) == 2
    if not is_pair or not all(is_whole(each) and each > 0 for each in block):
        raise wrong(f"{where}: block_structure", block, "[rows, columns]")
    if kind != "float":
        raise LlmqError(
            f"{where}: whole numbers with a scale per block of {block}: llmq has scales per group, "
            f"row or tensor; {_INSTEAD}"
        )
