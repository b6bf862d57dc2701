"""Quantized folders of others that llmq does not read: what each is, by its `quant_method`, and the
way around.

Most hold no integers on a grid of steps, or keep codes in an order that only their own kernels
know. The original model is the better start in any case: who quantizes what is quantized loses
twice."""

from __future__ import annotations

from typing import Any

from llmq.errors import LlmqError

_ORIGINAL = "quantize the original model with llmq"
_UNPACK = (
    f"{_ORIGINAL}, or load this one with transformers and {{package}}, call model.dequantize() and "
    "save_pretrained, and use the result"
)
_BITSANDBYTES = _UNPACK.format(package="bitsandbytes")
_INTEGERS = "for integers of 2 to 8 bits"

# quant_method -> what it is, and what to do instead.
METHODS: dict[str, tuple[str, str]] = {
    "bitsandbytes": ("bitsandbytes (NF4, FP4 or LLM.int8)", _BITSANDBYTES),
    "bitsandbytes_4bit": ("bitsandbytes in 4 bits (NF4 or FP4)", _BITSANDBYTES),
    "bitsandbytes_8bit": ("bitsandbytes in 8 bits (LLM.int8)", _BITSANDBYTES),
    "torchao": ("torchao, which stores tensors of its own classes", _ORIGINAL),
    "hqq": ("HQQ, in the layout of the hqq package", f"{_ORIGINAL} (--method hqq)"),
    "quanto": ("Quanto (optimum-quanto)", f"{_ORIGINAL} {_INTEGERS}"),
    "exl2": ("EXL2, for ExLlamaV2 alone", f"{_ORIGINAL}, with --rule for layers of more bits"),
    "exl3": ("EXL3, trellis codes for ExLlamaV3 alone", _ORIGINAL),
    "aqlm": ("AQLM, codebooks of vectors", f"{_ORIGINAL} (--bits 2)"),
    "vptq": ("VPTQ, codebooks of vectors", f"{_ORIGINAL} (--bits 2)"),
    "spqr": ("SpQR, with outliers beside its codes", f"{_ORIGINAL} (--bits 4)"),
    "higgs": ("HIGGS, grids of vectors", _UNPACK.format(package="flute-kernel")),
    "quip": ("QuIP#, codebooks of vectors", f"{_ORIGINAL} (--bits 2)"),
    "eetq": ("EETQ, 8 bits in the order of its own kernels", f"{_ORIGINAL} (--bits 8)"),
    "fbgemm_fp8": ("FP8 of FBGEMM", f"{_ORIGINAL} (--bits 8)"),
    "mxfp8": ("MXFP8", _ORIGINAL),
    "nvfp4": ("NVFP4", _ORIGINAL),
    "fp_quant": ("FP-Quant (NVFP4 or MXFP4)", _ORIGINAL),
    "fouroversix": ("Four over Six (NVFP4)", _ORIGINAL),
    "modelopt": ("NVIDIA ModelOpt", _ORIGINAL),
    "modelopt_fp4": ("NVIDIA ModelOpt in NVFP4", _ORIGINAL),
    "quark": ("AMD Quark", _ORIGINAL),
    "sinq": ("SINQ, with a scale for columns, too", _ORIGINAL),
    "marlin": (
        "GPTQ repacked for Marlin kernels",
        f"take the gptq folder that it was, or {_ORIGINAL}",
    ),
    "gguf": ("GGUF", "give the .gguf file itself as MODEL"),
    "metal": ("Metal kernels of transformers", _ORIGINAL),
    "gemma": ("Gemma's own layout, with quantized inputs of its layers", _ORIGINAL),
    "mlx": ("MLX", f"{_ORIGINAL} (--format awq, which mlx-lm reads)"),
}


def refusal(settings: dict[str, Any], known: list[str]) -> LlmqError:
    """The error for settings that no format of llmq claims. known: the methods that are read."""
    method = settings.get("quant_method")
    if method is None and {"bits", "group_size"} <= settings.keys():
        method = "mlx"  # which writes no method beside these
    found = METHODS.get(method.lower()) if isinstance(method, str) else None
    if found is None:
        return LlmqError(
            f"quantization method {method!r}: llmq loads {', '.join(known)} folders; {_ORIGINAL} "
            "instead"
        )
    what, way = found
    return LlmqError(
        f"quantization method {method!r}: {what}, which llmq does not read; {way} (it loads "
        f"{', '.join(known)})"
    )
