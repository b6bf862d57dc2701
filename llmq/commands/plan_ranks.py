"""`llmq plan MODEL --nodes 2 --gpus 4`: what `llmq quantize` would take of each of several
processes."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from llmq.commands.options import byte_size, whole
from llmq.commands.pace import rough_duration
from llmq.commands.parser import Parser
from llmq.errors import LlmqError

if TYPE_CHECKING:
    from llmq.ptq.job import Job


def add_arguments(parser: Parser) -> None:
    parser.more.add_argument(
        "--processes",
        type=whole(1),
        metavar="N",
        help="of torchrun on each node that share the work (default: 1)",
    )
    parser.more.add_argument(
        "--gpus", type=whole(1), metavar="N", help="the same, each with a GPU of its own"
    )
    parser.more.add_argument("--nodes", type=whole(1), default=1, metavar="N", help="default: 1")
    parser.more.add_argument(
        "--gpu-memory",
        type=byte_size,
        metavar="SIZE",
        help="of one GPU, such as 80GB, to tell whether the run fits",
    )


def n_processes(args: argparse.Namespace) -> int:
    """Of all nodes. Raises `LlmqError` where two options say it."""
    if args.gpus is not None and args.processes is not None:
        raise LlmqError("--gpus and --processes both say how many processes a node has; give one")
    return int(args.nodes * (args.gpus or args.processes or 1))


def planned(args: argparse.Namespace, job: Job, rate: float) -> dict[str, Any] | None:
    """What each takes, None for one process."""
    from llmq.ptq.budget import peak_bytes
    from llmq.ptq.followers import check_shared
    from llmq.ptq.ranks import Ranks
    from llmq.ptq.shares import Share

    if (n := n_processes(args)) == 1:
        return None
    share, peak = Share.of(job, n), peak_bytes(job)
    check_shared(job, Ranks(0, n))
    limit = args.gpu_memory
    return {
        **share.to_json(),
        "peak_bytes": peak,
        "seconds": round(share.flops / rate, 1),
        "gpu_memory_bytes": limit,
        "fits": None if limit is None else peak <= limit,
    }


def pairs(found: dict[str, Any] | None) -> dict[str, object]:
    """Lines for the screen."""
    if found is None:
        return {}
    n = found["n_processes"]
    memory = f"{found['peak_bytes'] / 1e9:.2f} GB above the libraries"
    if (limit := found["gpu_memory_bytes"]) is not None:
        memory += f", {'fits' if found['fits'] else 'does not fit'} into {limit / 1e9:.0f} GB"
    return {
        f"each of {n} processes": f"about {rough_duration(found['seconds'])}, {memory}, "
        f"{found['work_bytes'] / 1e9:.2f} GB of disk ({found['first_disk_bytes'] / 1e9:.2f} GB of "
        "the first)",
        "sent between them": f"{found['sent_bytes'] / 1e9:.2f} GB in all",
    }
