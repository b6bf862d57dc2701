"""`llmq generate MODEL --prompt TEXT`.

The model's generation config applies as in transformers, but for two things: `--temperature`
decides whether tokens are sampled, and only tokens are asked for, since nothing else is shown."""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmq.commands import options
from llmq.commands.options import real, whole
from llmq.commands.parser import Parser

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel

    from llmq.models.source import Source

HELP = "Generate text; streams tokens to stdout, prints tokens/s and weight GB/s to stderr."
EXAMPLES = (
    "llmq generate tiny --prompt 'def main():'",
    "llmq generate tiny --prompt 'def main():' --temperature 0.7 --seed 1",
    "llmq generate tiny-w4 --prompt 'import' --compute int8 --head-bits 8",
)
DEFAULT_NEW_TOKENS = 64
# Closer to 0 a score over the temperature leaves float32, and only the likeliest token is left
# anyway.
NO_TEMPERATURE = 1e-6
_USUAL = {"bos_token_id", "eos_token_id", "pad_token_id", "transformers_version"}


def add_arguments(parser: Parser) -> None:
    parser.add_argument("model", help=options.MODEL_HELP)
    parser.section("text")
    parser.add_argument("--prompt", required=True)
    parser.add_argument(
        "--max-new-tokens",
        type=whole(1),
        metavar="N",
        help="(default: max_new_tokens of the model's generation config, else "
        f"{DEFAULT_NEW_TOKENS}; at most what it has positions for)",
    )
    parser.add_argument(
        "--temperature",
        type=real(),
        default=0.0,
        help="0: the likeliest token each time, or the likeliest beam (default, whatever the "
        "generation config says of sampling); above, samples with its top_k, top_p and so on",
    )
    parser.add_argument("--seed", type=whole(0), default=0)
    parser.section("how it runs")
    parser.add_argument(
        "--dtype",
        choices=options.DTYPES,
        default="auto",
        metavar="DTYPE",
        help="auto, float32, bfloat16 or float16 (default: auto, as stored)",
    )
    options.add_inference_arguments(parser)


def run(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """The result as JSON-able data and as text."""
    from llmq.inference.settings import check, read_settings
    from llmq.models.source import Source
    from llmq.models.tokens import own_tokenizer
    from llmq.text.documents import check_vocabulary

    options.check_device(args.device)
    source = Source.open(args.model, args.revision)
    config, stored = source.config, read_settings(source.folder)
    tokenizer = own_tokenizer(source)
    prompt = _read_prompt(args, source.folder, tokenizer)
    is_sampled = args.temperature > NO_TEMPERATURE
    check({**stored, "do_sample": is_sampled}, args.device.partition(":")[0])  # before any weight
    max_new_tokens = _new_tokens(args.max_new_tokens, prompt.shape[1], config, stored)
    model = _load(args, source)
    check_vocabulary(prompt, model.config.get_text_config().vocab_size, "--prompt")
    return _answer(args, model, tokenizer, prompt, max_new_tokens), ""


def _read_prompt(args: argparse.Namespace, model_dir: Path, tokenizer: Any) -> Tensor:
    """Token ids of the prompt, int64 `[1, T]`."""
    from llmq.storage.boundary import reading

    with reading(model_dir, "its tokenizer cannot read the prompt", "give another --prompt"):
        return tokenizer(args.prompt, return_tensors="pt")["input_ids"]


def _load(args: argparse.Namespace, source: Source) -> PreTrainedModel:
    """The model, ready for decoding."""
    from llmq.formats.load import load
    from llmq.inference.decoding import prepare_decoding
    from llmq.storage.boundary import running

    model = load(
        source,
        dtype=args.dtype,
        device=args.device,
        compute=args.compute,
        strict=args.strict,
    )
    return running(args.model)(prepare_decoding)(model, head_bits=args.head_bits)


def _answer(
    args: argparse.Namespace,
    model: PreTrainedModel,
    tokenizer: Any,
    prompt: Tensor,
    max_new_tokens: int,
) -> dict[str, Any]:
    """Generate, print the text where it is not the JSON that is asked for, and report."""
    import torch

    from llmq.inference.module import backends_in_use
    from llmq.inference.settings import effective
    from llmq.inference.step import report
    from llmq.storage.boundary import running

    overrides = _overrides(args.temperature, model, tokenizer)
    settings = effective(model, overrides)
    is_one = (settings["num_return_sequences"] or 1) == (settings["num_beams"] or 1) == 1
    is_streamed = is_one and not args.json
    first_look = _FirstLook(args.model, model.dtype)
    overrides["streamer"] = _streamer(tokenizer) if is_streamed else None
    overrides["logits_processor"] = first_look.as_processors()
    torch.manual_seed(args.seed)
    started = time.perf_counter()
    sequences = running(args.model)(_generated)(
        model, prompt.to(model.device), max_new_tokens, overrides
    )
    seconds = time.perf_counter() - started
    n_prompt = prompt.shape[1] if first_look.n_prompt is None else first_look.n_prompt
    texts = []
    for row in sequences:
        kept = row[: _end(row, n_prompt, settings)]
        texts.append(running(args.model)(tokenizer.decode)(kept, skip_special_tokens=True))
    speed = _speed(model, _end(sequences[0], n_prompt, settings) - n_prompt, seconds)
    _tell(speed)
    if not args.json and not is_streamed:
        print(_shown("\n".join(texts)), end="", flush=True)  # the command line ends it
    return {
        "text": texts[0],
        "texts": texts,
        **speed,
        "backends": backends_in_use(model),
        "recorded_steps": report(model),
    }


def _tell(speed: dict[str, Any]) -> None:
    print(
        f"{speed['new_tokens']} tokens in {speed['seconds']:.2f} s: "
        f"{speed['tokens_per_second']:.1f} tokens/s, {speed['weight_gb_per_second']:.2f} GB/s of "
        "weights",
        file=sys.stderr,
    )


def _shown(text: str) -> str:
    """Text as it is for a file or a pipe; a terminal must not obey what a model writes."""
    from llmq.messages import escaped

    return escaped(text, keep="\n\t") if sys.stdout.isatty() else text


def _streamer(tokenizer: Any) -> Any:
    """Prints tokens as they come."""
    from transformers import TextStreamer

    class Streamer(TextStreamer):  # type: ignore[misc]
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            super().on_finalized_text(_shown(text), stream_end)

    return Streamer(tokenizer)


def _new_tokens(asked: int | None, n_prompt: int, config: Any, stored: Mapping[str, Any]) -> int:
    """How many tokens at most: those asked for, else those that the generation config says. Raises
    `LlmqError` for an empty prompt and for more than the model has positions for."""
    from llmq.errors import LlmqError
    from llmq.models.arch import check_length, position_limit

    if n_prompt == 0:
        raise LlmqError("--prompt: no tokens; give some text to go on from")
    left = (position_limit(config) or n_prompt + DEFAULT_NEW_TOKENS) - n_prompt
    n_new = asked or max(1, min(_stored_new_tokens(n_prompt, stored), left))
    remedy = f"give --max-new-tokens {left} or less" if left > 0 else "give a shorter --prompt"
    check_length(
        config, n_prompt + n_new, f"--prompt of {n_prompt} tokens and {n_new} new ones", remedy
    )
    return n_new


def _stored_new_tokens(n_prompt: int, stored: Mapping[str, Any]) -> int:
    """By the generation config: its `max_new_tokens`, else the default within its `max_length`."""
    from llmq.errors import LlmqError

    n_new, most = stored["max_new_tokens"], stored["max_length"]
    if n_new is not None:
        return int(n_new)
    if most is not None and most <= n_prompt:
        raise LlmqError(
            f"--prompt of {n_prompt} tokens: the generation config has max_length {most}, with the "
            "prompt; give --max-new-tokens, which goes before it"
        )
    return DEFAULT_NEW_TOKENS if most is None else min(DEFAULT_NEW_TOKENS, most - n_prompt)


def _overrides(temperature: float, model: PreTrainedModel, tokenizer: Any) -> dict[str, Any]:
    """What goes before the generation config of `model`."""
    stored = model.generation_config
    assert stored is not None
    overrides: dict[str, Any] = {
        "do_sample": temperature > NO_TEMPERATURE,
        "return_dict_in_generate": False,
        "output_scores": False,
        "output_logits": False,
        "output_attentions": False,
        "output_hidden_states": False,
    }
    if temperature > NO_TEMPERATURE:
        overrides["temperature"] = temperature
    if stored.stop_strings or stored.token_healing:
        overrides["tokenizer"] = tokenizer
    if stored.pad_token_id is None and stored.eos_token_id is None:
        # Rows of several texts end with something.
        pads = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
        overrides["pad_token_id"] = next(token for token in pads if token is not None)
    return overrides


def _generated(
    model: PreTrainedModel, prompt: Tensor, max_new_tokens: int, overrides: dict[str, Any]
) -> list[list[int]]:
    """Token ids of every text, the prompt's among them. All of the prompt counts, whatever its ids
    are: transformers would guess padding where one is that of the padding. Raises `LlmqError` with
    the keys that it can be about when transformers cannot do what the generation config says."""
    import torch

    from llmq.errors import LlmqError
    from llmq.inference.decoding import generate
    from llmq.inference.settings import explain
    from llmq_kernels.core.errors import SettingError

    stored = model.generation_config
    assert stored is not None
    try:
        output = generate(
            model, prompt, max_new_tokens, attention_mask=torch.ones_like(prompt), **overrides
        )
    except (LlmqError, SettingError, OSError, MemoryError):
        raise
    except Exception as error:
        says = stored.to_diff_dict()
        if not set(says) - _USUAL:  # nothing to blame: a defect
            raise
        raise LlmqError(f"generation config of the model: {explain(error, says)}") from error
    sequences: list[list[int]] = output.tolist()
    return sequences


class _FirstLook:
    """A logits processor that changes nothing: it notes how long the prompt is, which healing its
    last token changes, and refuses logits that are no numbers: the likeliest of NaNs is the first
    token of the vocabulary, and looks like an answer. Minus infinity is how a generation config
    suppresses tokens."""

    def __init__(self, model: str, dtype: torch.dtype) -> None:
        self._model, self._dtype = model, dtype
        self.n_prompt: int | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        from llmq.errors import VerificationError
        from llmq.evaluation.perplexity import not_finite

        if self.n_prompt is None and not bool((scores < math.inf).all()):
            raise VerificationError(
                f"{self._model}: the logits after the prompt are {not_finite(self._dtype)}"
            )
        n_tokens = input_ids.shape[1]
        # Speculative decoding tries later tokens first.
        self.n_prompt = n_tokens if self.n_prompt is None else min(self.n_prompt, n_tokens)
        return scores

    def as_processors(self) -> Any:
        from transformers import LogitsProcessorList

        return LogitsProcessorList([self])


def _end(row: Sequence[int], n_prompt: int, settings: Mapping[str, Any]) -> int:
    """Where a text ends: behind its first end of sequence, else before what fills its row up."""
    eos = settings["eos_token_id"]
    ids = set() if eos is None else {eos} if isinstance(eos, int) else set(eos)
    end = next((i + 1 for i in range(n_prompt, len(row)) if row[i] in ids), None)
    if end is not None:
        return end
    end, is_alone = len(row), (settings["num_return_sequences"] or 1) == 1
    while end > n_prompt and (
        row[end - 1] < 0 or (row[end - 1] == settings["pad_token_id"] and not is_alone)
    ):
        end -= 1
    return end


def _speed(model: PreTrainedModel, n_new: int, seconds: float) -> dict[str, Any]:
    weight_bytes = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    rate = n_new / seconds
    return {
        "new_tokens": n_new,
        "seconds": seconds,
        "tokens_per_second": rate,
        "weight_gb_per_second": rate * weight_bytes / 1e9,
    }
