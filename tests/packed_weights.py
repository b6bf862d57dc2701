"""Random packed weights and the error measure, for the tests of the kernels."""

import torch

from llmq_kernels import CODES, PackedWeight, pack


def make_weight(
    code_name,
    group_size,
    n,
    k,
    *,
    asymmetric=False,
    act_order=False,
    activations="none",
    scale_dtype=torch.float16,
    device="cpu",
):
    """Fresh random codes, scales and zero points. group_size: 0 for one scale per tensor, -1 for
    one per row."""
    code = CODES[code_name]
    columns = group_size if group_size > 0 else k
    n_groups = -(-k // columns)
    shape = (1, 1) if group_size == 0 else (n, n_groups)
    codes = torch.randint(0, code.levels, (n, k), dtype=torch.uint8)
    scale = (torch.rand(shape) * 0.02 + 0.005).to(scale_dtype)
    zero = torch.randint(0, code.levels, shape, dtype=torch.uint8) if asymmetric else None
    g_idx = (
        (torch.arange(k, dtype=torch.int32) // columns)[torch.randperm(k)] if act_order else None
    )
    tensors = [
        None if tensor is None else tensor.to(device)
        for tensor in (pack(codes, code.bits), scale, zero, g_idx)
    ]
    input_range = (
        torch.tensor([0.02, 97.0], device=device) if activations == "int8-static" else None
    )  # -1.94 .. 3.16: clips some of a normal distribution on both sides
    return PackedWeight(*tensors, code, columns, (n, k), activations, input_range)


def relative_error(out, expected):
    """The norm of the difference over the norm of what was expected; NaN anywhere gives NaN, which
    no comparison passes."""
    return float((out.double() - expected).norm() / expected.norm())
