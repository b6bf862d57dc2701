"""Save a quantized model that is in memory, atomically: the counterpart of `llmq.load`."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Collection, Mapping
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmq.arguments import check_type
from llmq.errors import LlmqError, LlmqWarning, VerificationError
from llmq.formats.base import Format
from llmq.formats.contents import Contents, write_card_of
from llmq.formats.engine_names import both, with_modules
from llmq.formats.engines import readings
from llmq.formats.extra import extra_tensors, matrices_among
from llmq.formats.registry import AUTO, choose_format, detect, has_groups, result_of
from llmq.grid.spec import ActSpec
from llmq.grid.tensor import QuantizedTensor
from llmq.inference.embedding import quantized_tables
from llmq.inference.module import quantized_modules
from llmq.models.arch import quantizable_layers
from llmq.models.companions import Companions, copy_companions
from llmq.models.identity import hub_id, without_places
from llmq.models.names import original_names
from llmq.models.older_keys import with_older_keys
from llmq.models.source import Source, meta_model
from llmq.models.stored import state_ties
from llmq.recipe import Layer, LayerPlan
from llmq.storage import files
from llmq.storage.packing import MAX_SHARD_BYTES


def checkpoint_config(
    fmt: Format,
    plans: list[LayerPlan],
    *,
    act_order: bool,
    activations: ActSpec,
    kept: Collection[str] = (),
    stored: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """The `quantization_config` for the linear layers of a model in a format. act_order: columns
    were rounded in true act-order, which shows in layers of more than one group. kept: modules with
    a matrix that are no such layers, as `kept_matrices` gives them. stored: modules -> what they
    are stored under, where that is another name."""
    stored = stored or {}
    specs = {plan.layer.name: plan.spec for plan in plans if not plan.role}
    tables = {
        plan.layer.name: (plan.role, plan.spec)
        for plan in plans
        if plan.role and plan.spec is not None
    }
    config = fmt.write_config(specs, act_order=act_order and has_groups(plans))
    config = fmt.tables.stated(config, tables) if tables else config
    is_kept = [name for name in kept if specs.get(name) is None and name not in tables]
    quantized = [name for name, spec in specs.items() if spec is not None]
    config = fmt.with_kept(config, both(is_kept, stored), both(quantized, stored))
    config = fmt.with_names(config, with_modules(stored))
    if fmt.activations is None and not activations.is_none:
        config["activations"] = activations.to_json()
    return config


def kept_matrices(model: nn.Module) -> list[str]:
    """Modules that hold a matrix as it is, embeddings aside: linear layers, the head, routers. What
    an engine would take for a quantized layer where nothing says that it is none."""
    found = []
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        is_matrix = isinstance(weight, Tensor) and weight.ndim == 2
        if is_matrix and not isinstance(module, nn.Embedding):
            found.append(name)
    return found


def write_configs(
    target_dir: Path,
    model_config: Any,
    quantization_config: dict[str, Any],
    *,
    name: str | None = None,
    companions: Companions | None = None,
) -> None:
    """Write config.json with the quantization config, and what its format puts beside it. name: the
    Hub id of the source. companions: what came along beside the weights."""
    data = without_places(model_config.to_dict(), name)
    data.pop("transformers_weights", None)
    if companions is not None:
        data = companions.adapt(data)
    data = with_older_keys(data)
    data["quantization_config"] = quantization_config
    files.write_json(target_dir / "config.json", data)
    fmt = detect(quantization_config)
    for file_name, content in (fmt.companions(quantization_config) if fmt else {}).items():
        files.write_json(target_dir / file_name, content)


def layer_tensors(name: str, qtensor: QuantizedTensor, fmt: Format) -> dict[str, Tensor]:
    """The stored tensors of one layer by full name."""
    return {f"{name}.{suffix}": tensor for suffix, tensor in fmt.write(qtensor).items()}


def save(
    model: PreTrainedModel,
    out_dir: str | os.PathLike[str],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    format: str = "auto",
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    source: Source | None = None,
) -> Path:
    """Write a quantized model to a folder that `llmq.load` and other engines load. The
    folder appears complete and read back, or not at all. What belongs to the checkpoint comes along
    from the folder that the model was loaded from (see `llmq.models.companions`).

    tokenizer: in place of that folder's. source: that folder, where it is open. format: "auto" or
    one of `llmq.formats.registry.NAMES`. Raises `LlmqError` when the model is not quantized, the
    format cannot hold it, or the output exists."""
    check_type("model", model, PreTrainedModel, "a transformers model, as llmq.load gives it")
    check_type("out_dir", out_dir, (str, os.PathLike), "the folder to write")
    target = Path(out_dir)
    files.check_output(target, overwrite)
    target = files.real_path(target)
    state_ties(model)
    source_dir = source_folder(model)
    shards = None if source is None else source.decoded
    extra = {} if source_dir is None else extra_tensors(model, source_dir, shards)
    contents = contents_of(model, format, extra)
    tensors = under_original_names(model, contents.tensors) | extra
    if offloaded := [name for name, tensor in tensors.items() if tensor.is_meta]:
        raise LlmqError(
            f"{offloaded[0]} and {len(offloaded) - 1} other tensors of this model are offloaded; "
            "load it without offloading (llmq.load), or write it with save_pretrained"
        )

    work_dir = target.with_name(f".{target.name}.llmq-saving")
    files.remove(work_dir)
    made = files.make_folder(work_dir)
    try:
        _write_shards(work_dir, tensors, max_shard_bytes)
        companions = Companions()
        if source_dir is not None:
            companions = copy_companions(source_dir, work_dir, tokenizer=tokenizer is None)
        if tokenizer is not None:
            tokenizer.save_pretrained(work_dir)
        _save_generation_config(model, work_dir)
        write_configs(
            work_dir,
            model.config,
            contents.config,
            name=None if source_dir is None else hub_id(source_dir),
            companions=companions,
        )
        write_card_of(contents, work_dir, source_dir, target.name)
        files.write_manifest(work_dir)
        files.publish(work_dir, target)
    finally:
        shutil.rmtree(work_dir, ignore_errors=True)
        files.remove_empty(made)
    return Path(out_dir)


def format_tensors(
    model: PreTrainedModel, name: str, extra: Mapping[str, Tensor] | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the `quantization_config` of `contents_of`."""
    contents = contents_of(model, name, extra)
    return contents.tensors, contents.config


def contents_of(
    model: PreTrainedModel, name: str, extra: Mapping[str, Tensor] | None = None
) -> Contents:
    """What is written of a quantized model. name: of a format, or "auto". extra: tensors that will
    be stored beside those of the model. Raises `LlmqError` when the model is not quantized, has
    adapters, or the format cannot hold it."""
    quantized = {
        name: module.qtensor()
        for name, module in quantized_modules(model).items()
        if not module.is_shared
    }
    tables = quantized_tables(model)
    quantized |= {name: table for name, (_, table) in tables.items()}
    if not quantized:
        raise LlmqError(
            "this model has no quantized layer; use model.save_pretrained for a full-precision "
            "model"
        )
    refuse_adapters(model)
    plans, act_spec = layer_plans(model, quantized), activations_of(model)
    act_order = any(qtensor.g_idx is not None for qtensor in quantized.values())
    fmt = choose_format(name, plans, act_spec, act_order=act_order)
    if name == AUTO and act_order and has_groups(plans):
        _tell_of_order(fmt, plans, act_spec)
    tensors = kept_tensors(model, quantized.keys())
    for layer, qtensor in quantized.items():
        role = tables[layer][0] if layer in tables else ""
        tensors.update(layer_tensors(layer, qtensor, fmt.for_role(role)))
    shapes = {name: tensor.shape for name, tensor in (extra or {}).items()}
    kept = [*kept_matrices(model), *matrices_among(shapes)]
    stored = stored_modules(model, [*(plan.layer.name for plan in plans), *kept])
    config = checkpoint_config(
        fmt, plans, act_order=act_order, activations=act_spec, kept=kept, stored=stored
    )
    result = result_of(fmt, plans, act_spec, act_order=act_order, stored=stored)
    n_extra = sum(map(prod, shapes.values()))
    return Contents(tensors, n_extra, config, fmt.name, plans, act_spec, readings(result))


def stored_modules(model: PreTrainedModel, names: Collection[str]) -> dict[str, str]:
    """Modules with a matrix -> what checkpoints call them, where that is another name."""
    skeleton = meta_model(model.config, type(model))
    weights = [f"{name}.weight" for name in names]
    own = skeleton.state_dict().keys()
    found = original_names(model, skeleton, [name for name in weights if name in own])
    return {
        name.removesuffix(".weight"): its.removesuffix(".weight")
        for name, its in found.items()
        if name != its
    }


def under_original_names(
    model: PreTrainedModel, tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The tensors of a model under the names that checkpoints have, which other engines know: what
    is packed takes the place of `NAME.weight`. Values as they are."""
    skeleton = meta_model(model.config, type(model))
    own = skeleton.state_dict().keys()
    parameter_of = {
        name: name if name in own else f"{name.rpartition('.')[0]}.weight" for name in tensors
    }
    stored = original_names(model, skeleton, dict.fromkeys(parameter_of.values()))
    found = {}
    for name, tensor in tensors.items():
        original = stored[parameter_of[name]]
        if name not in own:
            original = f"{original.removesuffix('.weight')}.{name.rpartition('.')[2]}"
        found[original] = tensor
    return found


def _tell_of_order(fmt: Format, plans: list[LayerPlan], activations: ActSpec) -> None:
    """Whoever named no format hears who reads columns in another order than that of their
    groups."""
    result = result_of(fmt, plans, activations, act_order=True)
    names = [reading.engine for reading in readings(result) if reading.reads]
    warnings.warn(
        "the columns of this model are not in the order of their groups (act-order), which few "
        f"engines read: it is written as {fmt.name}, for {', '.join(names)}; name a format to "
        "choose",
        LlmqWarning,
        stacklevel=4,
    )


def refuse_adapters(model: torch.nn.Module) -> None:
    """Raise `LlmqError` for a model whose layers have adapters on them, which are no part of a
    checkpoint."""
    wrapped = [name for name, module in model.named_modules() if hasattr(module, "base_layer")]
    if wrapped:
        raise LlmqError(
            f"{len(wrapped)} layers of this model have adapters, the first being {wrapped[0]}; "
            "save the adapter (save_pretrained of the PEFT model) and merge it into the folder "
            "with llmq.merge_adapter(folder, adapter, out=OUT)"
        )


def layer_plans(model: PreTrainedModel, quantized: dict[str, QuantizedTensor]) -> list[LayerPlan]:
    """What became of each layer of the full-precision model: a kept one is not quantized."""
    layers = {
        layer.name: layer for layer in quantizable_layers(meta_model(model.config, type(model)))
    }
    layers |= {
        name: replace(layers[name], shape=qtensor.shape)
        if name in layers
        else Layer(name, qtensor.shape)
        for name, qtensor in quantized.items()
    }
    roles = {name: role for name, (role, _) in quantized_tables(model).items()}
    return [
        LayerPlan(
            layer, quantized[name].spec if name in quantized else None, role=roles.get(name, "")
        )
        for name, layer in layers.items()
    ]


def activations_of(model: PreTrainedModel) -> ActSpec:
    """How the layers quantize their inputs. Raises `LlmqError` where they differ."""
    head = model.get_output_embeddings()
    layers = [module for module in quantized_modules(model).values() if module is not head]
    activations = {module.activations for module in layers} or {ActSpec()}
    if len(activations) != 1:
        raise LlmqError(
            "the layers of this model quantize their inputs in different ways, which no format "
            "holds; give all the same ActSpec"
        )
    return activations.pop()


def kept_tensors(model: PreTrainedModel, quantized: Collection[str]) -> dict[str, Tensor]:
    """What is stored as it is, tied weights once. quantized: names of layers."""
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict().items():
        layer, _, suffix = name.rpartition(".")
        if layer in quantized and suffix != "bias":
            continue
        if tensor.is_meta or tensor.data_ptr() not in seen:  # what is offloaded has no address
            seen.add(tensor.data_ptr())
            tensors[name] = tensor
    return tensors


def source_folder(model: PreTrainedModel) -> Path | None:
    """The folder that a model was loaded from, or None."""
    name = getattr(model.config, "_name_or_path", None) or getattr(model, "name_or_path", None)
    if not name:
        return None
    if (Path(name) / "config.json").is_file():
        return Path(name)
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:  # of a Hub id, which transformers has read from its cache
        cached = try_to_load_from_cache(name, "config.json")
    except HFValidationError:
        return None
    return Path(cached).parent if isinstance(cached, str) else None


def _save_generation_config(model: PreTrainedModel, work_dir: Path) -> None:
    """That of the model in memory; where transformers refuses to write it, the one that came along,
    if any, stays."""
    if model.generation_config is None:
        return
    try:
        model.generation_config.save_pretrained(work_dir)
    except ValueError as error:
        kept = (
            "the source's is kept" if (work_dir / "generation_config.json").exists() else "left out"
        )
        warnings.warn(
            "generation_config.json: transformers does not write that of this model "
            f"({str(error).splitlines()[0]}); {kept}",
            LlmqWarning,
            stacklevel=3,
        )


def _write_shards(work_dir: Path, tensors: dict[str, Tensor], max_shard_bytes: int) -> None:
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in sorted(tensors.items()):
        if size + tensor.nbytes > max_shard_bytes and shards[-1]:
            shards.append({})
            size = 0
        shards[-1][name] = tensor.detach().cpu()
        size += tensor.nbytes
    if len(shards) == 1:
        _write_shard(work_dir / "model.safetensors", shards[0])
        return
    names = {
        f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors": shard
        for i, shard in enumerate(shards)
    }
    for file_name, shard in names.items():
        _write_shard(work_dir / file_name, shard)
    files.write_index(
        work_dir,
        {name: list(shard) for name, shard in names.items()},
        sum(tensor.nbytes for tensor in tensors.values()),
    )


def _write_shard(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a file and read it back. Raises `VerificationError` when a byte differs."""
    files.write_tensors(path, tensors)
    with safe_open(path, "pt") as written:
        for name, tensor in tensors.items():
            if not torch.equal(
                written.get_tensor(name).reshape(-1).view(torch.uint8),
                tensor.reshape(-1).view(torch.uint8),
            ):
                raise VerificationError(
                    f"{path.name}: tensor {name} reads back otherwise than it was written; the "
                    "disk or the memory is faulty"
                )
