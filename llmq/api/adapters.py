"""`llmq.merge_adapter`: an adapter that was trained with PEFT, into the weights of a quantized
folder.

PEFT adds an adapter to a dense weight, and the weight of a packed layer is not dense. So each layer
is unpacked alone, PEFT merges into that copy by its own rules, whatever the kind of adapter, and
what differs then is quantized again. Nothing else is written anew."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmq.arguments import check_type
from llmq.errors import LlmqError, LlmqWarning
from llmq.formats.base import Format
from llmq.formats.layers import StoredLayers
from llmq.formats.load import load
from llmq.formats.replacing import as_stored, write_replaced
from llmq.grid.requantize import requantize
from llmq.grid.tensor import QuantizedTensor
from llmq.inference.module import QuantLinear
from llmq.models import compat
from llmq.models.source import Source
from llmq.storage import files
from llmq.storage.boundary import reading

RECORD = "merge.json"
NEAREST, STOCHASTIC = ROUNDINGS = ("nearest", "stochastic")
_MUCH = 0.5  # share of a change whose loss is worth a warning
_ADAPTER = ("adapter_config.json", "adapter_model.safetensors")


@torch.no_grad()
def merge_adapter(
    folder: str | os.PathLike[str],
    adapter: str | os.PathLike[str],
    *,
    out: str | os.PathLike[str],
    rounding: str = STOCHASTIC,
    seed: int = 0,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write the quantized `folder` to `out` with an adapter of PEFT merged into its weights, in the
    same format: layers that the adapter changes are quantized again with their own spec, the bytes
    of all other tensors stay.

    folder: quantized, in any format that llmq writes; a Hub id, too. adapter: the folder that
    `save_pretrained` of a PEFT model wrote. rounding: "stochastic", to one of the two neighbouring
    codes by chance (seed), each as often as keeps the value on average; or "nearest", which adds
    less noise and undoes all changes below half a step, most of an adapter's where codes have few
    bits.

    Returns the report, which is also in `out` as merge.json: of each layer that was quantized again
    `change` (norm of what the adapter adds to the weight) and `error` (norm of what rounding adds
    to that), as shares of the weight's norm; `kept`, the share of the change that is in the result;
    and `codes_changed`, the share of its codes. Warns with `LlmqWarning` where less than half is
    kept. Raises `LlmqError` for an adapter that does not fit or cannot be merged."""
    check_type("folder", folder, (str, os.PathLike), "a quantized folder")
    check_type("adapter", adapter, (str, os.PathLike), "a folder that PEFT wrote")
    check_type("out", out, (str, os.PathLike), "the folder to write")
    if rounding not in ROUNDINGS:
        raise LlmqError(f"rounding {rounding!r}: expected one of {', '.join(ROUNDINGS)}")
    check_type("seed", seed, int, "a whole number")
    files.check_output(Path(out), overwrite)
    source = Source.open(folder)
    layers = StoredLayers.of(source)
    if layers.format is None:
        raise LlmqError(
            f"{source.folder}: is not quantized; merge with PEFT itself (merge_and_unload), then "
            "quantize the result"
        )
    generator = torch.Generator().manual_seed(seed) if rounding == STOCHASTIC else None
    merged = _Merged(layers, layers.format, generator)
    model = _attached(source, Path(adapter))
    for name, layer in _adapted(model):
        merged.add(name, layer)
    for name, (old, new) in _trained_whole(model):
        merged.replace(name, old, new)
    if not merged.tensors:
        raise LlmqError(f"{adapter}: changes no weight of {source.folder}; was it trained?")
    report = {
        "format": layers.format.name,
        "model": source.name,
        "adapter": Path(adapter).name,
        "rounding": rounding,
        "kept": merged.kept_share(),
        "layers": merged.layers,
        "kept_layers": merged.kept_layers,
        "unchanged_tensors": len(source.shards.names) - len(merged.tensors),
    }
    write_replaced(source, Path(out), merged.tensors, {RECORD: report}, overwrite=overwrite)
    _warn_of_loss(report)
    return {"out": os.fspath(out), **report}


class _Merged:
    """What has changed so far. tensors: by stored name. layers, kept_layers: their reports, of
    quantized ones and of those in full precision."""

    def __init__(
        self, layers: StoredLayers, fmt: Format, generator: torch.Generator | None
    ) -> None:
        self.stored, self.source, self.generator = layers, layers.source, generator
        self.fmt = fmt.given(layers.activations)
        self.tensors: dict[str, Tensor] = {}
        self.layers: list[dict[str, Any]] = []
        self.kept_layers: list[dict[str, Any]] = []
        ties = compat.ties(layers.skeleton)
        self._tied = {name.removesuffix(".weight") for name in (*ties, *ties.values())}

    def add(self, name: str, layer: Any) -> None:
        """Merge the adapter of one layer of PEFT, which is named as in the model."""
        base = layer.get_base_layer()
        if isinstance(base, QuantLinear):
            old = base.qtensor()
            weight = old.dequantize()
            wanted = _merge(layer, _dense(base, weight))
            if not torch.equal(wanted, weight):
                self._quantize(name, old, wanted)
            return
        weight = base.weight.detach().float()
        base.weight = nn.Parameter(weight.clone(), requires_grad=False)
        wanted = _merge(layer, base)
        if not torch.equal(wanted, weight):
            self._keep(name, weight, wanted)

    def replace(self, name: str, old: Tensor, new: Tensor) -> None:
        """A weight in full precision that was trained as a whole."""
        if not torch.equal(old.float(), new.float()):
            self._keep(name, old.float(), new.float())

    def _quantize(self, name: str, old: QuantizedTensor, wanted: Tensor) -> None:
        new = requantize(old, wanted, self.generator)
        fmt = self.fmt.for_role(self.stored.roles.get(name, ""))
        for suffix, tensor in fmt.write(new).items():
            stored = f"{self._stored_name(name)}.{suffix}"
            if stored in self.source.shards.names or suffix != "g_idx":
                self.tensors[stored] = tensor
        norm, before, after = wanted.norm(), old.dequantize(), new.dequantize()
        change = wanted - before
        self.layers.append(
            {
                "name": name,
                "spec": str(old.spec),
                "change": float(change.norm() / norm),
                "error": float((after - wanted).norm() / norm),
                "kept": float(((after - before) * change).sum() / change.square().sum()),
                "codes_changed": float((new.codes() != old.codes()).float().mean()),
            }
        )

    def _keep(self, name: str, old: Tensor, wanted: Tensor) -> None:
        stored = f"{self._stored_name(name)}.weight"
        new = as_stored(wanted, self.source, stored)
        self.tensors[stored] = new
        change, error = (wanted - old).norm(), (new.float() - wanted).norm()
        norm = wanted.norm()
        self.kept_layers.append(
            {"name": name, "change": float(change / norm), "error": float(error / norm)}
        )

    def kept_share(self) -> float | None:
        """The mean over layers of the share of a change that is in the result; None where no
        quantized layer changed."""
        if not self.layers:
            return None
        return float(sum(layer["kept"] for layer in self.layers) / len(self.layers))

    def _stored_name(self, name: str) -> str:
        if name in self._tied or f"{name}.weight" not in self.stored.names:
            raise LlmqError(
                f"{self.source.folder}: {name} has no weight of its own here (it is tied to "
                "another), so nothing can be merged into it alone; keep the adapter beside the "
                "weights"
            )
        return self.stored.stored_name(name)


def _warn_of_loss(report: dict[str, Any]) -> None:
    """Say so where rounding undid most of what was trained."""
    kept = report["kept"]
    if kept is None or kept >= _MUCH:
        return
    other = "" if report["rounding"] == STOCHASTIC else f', merge with rounding="{STOCHASTIC}"'
    warnings.warn(
        f"rounding kept {max(kept, 0):.0%} of what the adapter changes: it is smaller than the "
        f"steps of these weights; keep the adapter beside the weights{other}, or merge it into the "
        "full-precision model and quantize that",
        LlmqWarning,
        stacklevel=4,
    )


def _attached(source: Source, adapter: Path) -> Any:
    """The model with its adapter, as PEFT loads it. Raises `LlmqError`."""
    try:
        from peft import PeftConfig, PeftModel
    except ImportError:
        raise LlmqError(
            "merge_adapter needs peft, which is not installed; pip install peft"
        ) from None
    for name in _ADAPTER:
        if not (adapter / name).is_file():
            raise LlmqError(
                f"{adapter}: has no {name}; expected the folder that save_pretrained of a PEFT "
                "model wrote"
            )
    with reading(adapter, "peft cannot read it", "save the adapter again"):
        config = PeftConfig.from_pretrained(str(adapter))
    if reason := _refusal(config):
        raise LlmqError(f"{adapter}: {reason}; keep the adapter beside the weights")
    model = load(source)
    with reading(adapter, f"does not fit {source.folder}", "merge it into the model it is for"):
        return PeftModel.from_pretrained(model, str(adapter))


def _refusal(config: Any) -> str | None:
    """Why what an adapter trained cannot be put into the weights, or None."""
    if getattr(config, "is_prompt_learning", False):
        return f"{config.peft_type.value} adds tokens and changes no weight"
    if getattr(config, "trainable_token_indices", None):
        return "it trains single tokens, which are no part of a layer"
    if getattr(config, "bias", "none") != "none" or getattr(config, "lora_bias", False):
        return "it trains biases, which merge_adapter leaves alone"
    return None


def _adapted(model: Any) -> Iterator[tuple[str, Any]]:
    """Every layer that PEFT put an adapter on, by its name in the model."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    inner = model.get_base_model()
    for name, module in list(inner.named_modules()):
        if isinstance(module, BaseTunerLayer):
            yield name, module


def _trained_whole(model: Any) -> Iterator[tuple[str, tuple[Tensor, Tensor]]]:
    """Weights that were trained beside the adapter (`modules_to_save`): name of the layer, before
    and after. Raises `LlmqError` for other things than a weight."""
    from peft.utils import ModulesToSaveWrapper

    inner = model.get_base_model()
    for name, module in list(inner.named_modules()):
        if not isinstance(module, ModulesToSaveWrapper):
            continue
        before = dict(module.original_module.named_parameters())
        after = dict(module.modules_to_save[module.active_adapters[0]].named_parameters())
        if after.keys() != {"weight"} or before.keys() != {"weight"}:
            raise LlmqError(
                f"{name}: was trained as a whole and is not a single weight in full precision; "
                "keep the adapter beside the weights"
            )
        yield name, (before["weight"].detach(), after["weight"].detach())


def _dense(layer: QuantLinear, weight: Tensor) -> nn.Linear:
    """A plain layer in float32."""
    with torch.device("meta"):
        plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
    plain.weight = nn.Parameter(weight.clone(), requires_grad=False)
    return plain


def _merge(layer: Any, base: nn.Module) -> Tensor:
    """The weight after PEFT has merged its adapter into `base`, float32."""
    layer.base_layer = base
    layer.merge()
    weight = base.weight
    assert isinstance(weight, Tensor)
    return weight.detach()
