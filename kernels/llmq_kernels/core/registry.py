"""All backends, one line each, in the order in which they are asked. The only module of `core` that
knows the other rooms: a new backend is a file with its record and a line here."""

from __future__ import annotations

from llmq_kernels.compiled import bf16_backends, int8_backend
from llmq_kernels.core import reference_backend
from llmq_kernels.core.backend import Backend
from llmq_kernels.core.errors import SettingError
from llmq_kernels.torch_cpu import int4pack, int8pack, kleidiai, onednn
from llmq_kernels.triton import backend as triton

BACKENDS: tuple[Backend, ...] = (
    triton.BACKEND,
    triton.INT8_BACKEND,
    bf16_backends.AMX,
    bf16_backends.AVX512,
    int8_backend.BACKEND,
    int4pack.BACKEND,
    int8pack.BACKEND,
    onednn.BACKEND,
    kleidiai.BACKEND,
    reference_backend.BACKEND,
)


def backend_named(name: str) -> Backend:
    """The backend of that name. Raises `SettingError` with the names that exist."""
    chosen = next((backend for backend in BACKENDS if backend.name == name), None)
    if chosen is None:
        raise SettingError(
            f"LLMQ_BACKEND={name}: no such backend; choose one of "
            f"{', '.join(backend.name for backend in BACKENDS)}"
        )
    return chosen
