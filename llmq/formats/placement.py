"""Where a loaded model goes: one device, named in llmq's way or in that of transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import torch

from llmq.arguments import refused
from llmq.errors import LlmqError

DeviceMap: TypeAlias = str | int | torch.device | Mapping[str, str | int | torch.device]
ROOM = 1.2  # of the weights' bytes: activations and a cache lie beside them
_SPREAD = ("balanced", "balanced_low_0", "sequential")
_FORMS = "'cpu', 'cuda', 'cuda:1', 'auto', or a dict that sends every part to the same device"


def device_of(
    device: str | torch.device | None, device_map: DeviceMap | None, n_bytes: int
) -> torch.device:
    """The one device of a model: that of `device`, else of `device_map`, else the CPU. "auto" is
    the first GPU with room for `n_bytes` of weights and a fifth more, else the CPU. Raises
    `LlmqError` for what would spread a model over devices or the disk, and for what is not here."""
    if device is not None and device_map is not None:
        raise LlmqError(
            f"device {str(device)!r} and device_map {device_map!r} both say where the model goes; "
            "give one of them"
        )
    if device_map is None:
        return _checked("device", "cpu" if device is None else device)
    if isinstance(device_map, Mapping):
        return _only_device(device_map)
    if device_map == "auto":
        return _with_room(n_bytes)
    if device_map in _SPREAD:
        raise LlmqError(
            f"device_map {device_map!r}: it would spread layers over several devices, and llmq "
            "runs a model on one; give 'auto' or a device"
        )
    return _checked("device_map", device_map)


def _only_device(device_map: Mapping[str, Any]) -> torch.device:
    places = {str(place) for place in device_map.values()}
    if elsewhere := places & {"disk", "meta"}:
        raise LlmqError(
            f"device_map sends layers to {elsewhere.pop()}, where llmq computes nothing; give one "
            "device, and quantize the model first if it is too large"
        )
    if len(places) != 1:
        named = f"spreads layers over {', '.join(sorted(places))}" if places else "is empty"
        raise LlmqError(f"device_map {named}, and llmq runs a model on one device; give {_FORMS}")
    return _checked("device_map", next(iter(device_map.values())))


def _with_room(n_bytes: int) -> torch.device:
    for index in range(torch.cuda.device_count()):
        free, _ = torch.cuda.mem_get_info(index)
        if free > ROOM * n_bytes:
            return torch.device("cuda", index)
    return torch.device("cpu")


def _checked(name: str, value: Any) -> torch.device:
    if isinstance(value, bool) or not isinstance(value, str | int | torch.device):
        raise refused(name, value, _FORMS)
    try:
        device = torch.device("cuda", value) if isinstance(value, int) else torch.device(value)
    except RuntimeError:
        raise refused(name, value, _FORMS) from None
    if device.type == "meta":
        raise LlmqError(f"{name} 'meta': no weights would be loaded; give {_FORMS}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise LlmqError(
            f"{name} {str(device)!r}: not available here, where torch sees "
            f"{torch.cuda.device_count()} GPUs; give 'cpu' ('llmq doctor' lists the devices)"
        )
    return device
