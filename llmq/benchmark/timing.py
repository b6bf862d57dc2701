"""Seconds of a call, measured so that caches and launches do not decide.

On a GPU, one CUDA graph holds a call on each of several copies of the weight, together larger than
the L2 cache: every call finds its weight in device memory, and no launch gap is counted. The median
of the replays is divided by the number of copies. On a CPU the copies take turns in the same way,
timed call by call."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import torch

from llmq_kernels.core.timing import medians

Call = Callable[[], object]


def seconds(calls: Sequence[Call], device: torch.device, repeats: int = 20) -> float:
    """Median seconds of one call. calls: the same work on different copies of its weights."""
    return (
        _gpu_seconds(calls, repeats)
        if device.type == "cuda"
        else medians({"call": calls}, repeats)["call"]
    )


def _gpu_seconds(calls: Sequence[Call], repeats: int) -> float:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:  # compiles, and fills the allocator before capture
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    events = [
        (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
        for _ in range(repeats)
    ]
    for _ in range(3):
        graph.replay()
    for start, stop in events:
        start.record()
        graph.replay()
        stop.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(stop) for start, stop in events) / 1e3 / len(calls)


def copies_for(n_bytes: int, device: torch.device) -> int:
    """Copies of a weight of `n_bytes` that together exceed three times the L2 cache (on a CPU: 256
    MB); 2 to 64."""
    cold = (
        3 * torch.cuda.get_device_properties(device).L2_cache_size
        if device.type == "cuda"
        else 256 << 20
    )
    return min(max(-(-cold // n_bytes), 2), 64)


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second, read plus written, of a copy on the device."""
    n_bytes = (2 << 30) if device.type == "cuda" else (128 << 20)
    source = torch.full((n_bytes,), 77, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * n_bytes / seconds([lambda: target.copy_(source)], device, repeats=10)
