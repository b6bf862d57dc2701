"""Tensors in, tensors out: the codes, their one storage layout, the reference arithmetic and the
backends that are checked against it.

Imports torch and nothing of transformers or llmq. Triton is imported where it is used, never here,
so that every machine can import this package."""

from llmq_kernels.core.backend import Backend
from llmq_kernels.core.codes import CODES, Code
from llmq_kernels.core.dispatch import PreparedWeight, linear, select_backend
from llmq_kernels.core.packing import pack, packed_width, unpack
from llmq_kernels.core.registry import BACKENDS
from llmq_kernels.core.weight import PackedWeight

__all__ = [
    "BACKENDS",
    "CODES",
    "Backend",
    "Code",
    "PackedWeight",
    "PreparedWeight",
    "linear",
    "pack",
    "packed_width",
    "select_backend",
    "unpack",
]
