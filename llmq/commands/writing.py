"""A model that writes one answer after the other, for `generate` and `chat`.

The model's generation config applies as in transformers, but for two things: `--temperature`
decides whether tokens are sampled, and only tokens are asked for, since nothing else is shown."""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmq.commands import scoring, streaming, writing_options
from llmq.errors import LlmqError

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import DynamicCache, PreTrainedModel

    from llmq.models.source import Source

_USUAL = {"bos_token_id", "eos_token_id", "pad_token_id", "transformers_version"}


@dataclass(frozen=True)
class Answer:
    """texts: what was written behind the prompt, without special tokens; one, but where the
    generation config wants several. whole_texts: with the prompt. ids: of the first, prompt
    included. finish_reason: of the first, "end_token", "stop_string", "max_new_tokens" or
    "other"."""

    texts: list[str]
    whole_texts: list[str]
    ids: list[int]
    n_prompt: int
    n_new: int
    seconds: float
    finish_reason: str

    @property
    def text(self) -> str:
        """The first text."""
        return self.texts[0]

    @property
    def remark(self) -> str:
        """What a user has to know of the end of the first text."""
        if self.finish_reason != "max_new_tokens":
            return ""
        return f"; cut off after {self.n_new} tokens (see --max-new-tokens)"


@dataclass(frozen=True)
class Start:
    """What is known before weights are read. stored: the generation config. is_templated: prompts
    go through the chat template."""

    args: argparse.Namespace
    source: Source
    stored: Mapping[str, Any]
    tokenizer: Any
    is_templated: bool

    @classmethod
    def of(cls, args: argparse.Namespace) -> Start:
        """Raises `LlmqError` for everything that can be checked without the prompt."""
        from llmq.inference.settings import check, read_settings
        from llmq.models.source import Source
        from llmq.models.tokens import own_tokenizer

        writing_options.check_options(args)
        source = Source.open(args.model, args.revision)
        stored = read_settings(source.folder)
        tokenizer = own_tokenizer(source)
        is_templated = writing_options.uses_template(args, tokenizer)
        sampling = {**stored, "do_sample": writing_options.is_sampled(args)}
        check(sampling, args.device.partition(":")[0])
        return cls(args, source, stored, tokenizer, is_templated)

    @property
    def room(self) -> writing_options.Room:
        """How many tokens there may be."""
        return writing_options.Room.of(
            self.args, self.source.config, self.stored, self.is_templated
        )

    def writer(self) -> Writer:
        """The model, loaded."""
        from llmq.text.chat import turn_end

        end_id = turn_end(self.tokenizer) if self.is_templated else None
        return Writer(self.args, self.source, self.tokenizer, end_id)


class Writer:
    """A model that is loaded, and how it writes. end_id: a token that ends an answer, beside those
    of the generation config."""

    def __init__(
        self, args: argparse.Namespace, source: Source, tokenizer: Any, end_id: int | None
    ) -> None:
        import torch

        self._args, self.tokenizer = args, tokenizer
        self.model = _load(args, source)
        self.options = _overrides(args, self.model, tokenizer, end_id)
        self._criterion: streaming.StopAt | None = None
        torch.manual_seed(args.seed)

    @property
    def is_one(self) -> bool:
        """Whether there is one text, from first token to last, that can be printed as it grows."""
        settings = self._settings()
        return (settings["num_return_sequences"] or 1) == (settings["num_beams"] or 1) == 1

    def stop(self) -> None:
        """Have the answer that is being written end with the next token; from a signal handler."""
        if self._criterion is not None:
            self._criterion.is_asked_to = True

    def write(
        self,
        prompt: Tensor,
        max_new_tokens: int,
        streamer: streaming.Streamer | None = None,
        cache: DynamicCache | None = None,
    ) -> Answer:
        """What the model answers to a prompt `[1, T]`. cache: keys and values of its first tokens.
        Raises `LlmqError` for what the generation config asks of transformers in vain."""
        from transformers import LogitsProcessorList, StoppingCriteriaList

        from llmq.models.compat import cache_name
        from llmq.storage.boundary import running
        from llmq.text.documents import check_vocabulary

        args, settings = self._args, self._settings()
        check_vocabulary(prompt, self.model.config.get_text_config().vocab_size, "--prompt")
        first_look = _FirstLook(args.model, self.model.dtype)
        self._criterion = streaming.StopAt(self.tokenizer, prompt.shape[1], args.stop)
        overrides = {
            **self.options,
            "streamer": streamer,
            "logits_processor": LogitsProcessorList([first_look]),
            "stopping_criteria": StoppingCriteriaList([self._criterion]),
        }
        if cache is not None:
            overrides[cache_name()] = cache
        started = time.perf_counter()
        sequences = running(args.model)(_generated)(
            self.model, prompt.to(self.model.device), max_new_tokens, overrides
        )
        seconds = time.perf_counter() - started
        n_prompt = prompt.shape[1] if first_look.n_prompt is None else first_look.n_prompt
        rows = [row[: _end(row, n_prompt, settings)] for row in sequences]
        whole, texts = running(args.model)(self._texts)(prompt[0].tolist(), rows)
        n_new = len(rows[0]) - n_prompt
        reason = self._finish_reason(rows[0], n_prompt, n_new >= max_new_tokens)
        return Answer(texts, whole, rows[0], n_prompt, n_new, seconds, reason)

    def _settings(self) -> dict[str, Any]:
        from llmq.inference.settings import effective

        return effective(self.model, self.options)

    def _texts(self, prompt: list[int], rows: list[list[int]]) -> tuple[list[str], list[str]]:
        """Of every row: all of it, and what is behind the prompt, up to a stop string."""
        given = self.tokenizer.decode(prompt, skip_special_tokens=True)
        whole_texts, texts = [], []
        for row in rows:
            whole = self.tokenizer.decode(row, skip_special_tokens=True)
            text = streaming.continuation(self.tokenizer, row, len(prompt))
            if whole.startswith(given):  # also where the prompt's last token was healed
                text = whole[len(given) :]
            text = streaming.cut(text, self._args.stop)
            whole_texts.append(given + text)
            texts.append(text)
        return whole_texts, texts

    def _finish_reason(self, row: list[int], n_prompt: int, is_full: bool) -> str:
        from llmq.inference.decoding import end_ids

        settings = self._settings()
        if row[-1] in end_ids(settings["eos_token_id"]):
            return "end_token"
        stored = settings["stop_strings"] or []
        stops = [*self._args.stop, *([stored] if isinstance(stored, str) else stored)]
        if streaming.StopAt(self.tokenizer, n_prompt, stops).ends(row):
            return "stop_string"
        return "max_new_tokens" if is_full else "other"


def _load(args: argparse.Namespace, source: Source) -> PreTrainedModel:
    """The model, ready for decoding."""
    from llmq.inference.decoding import prepare_decoding
    from llmq.storage.boundary import running

    model = scoring.load_model(args, source)
    return running(args.model)(prepare_decoding)(model, head_bits=args.head_bits)


def _overrides(
    args: argparse.Namespace, model: PreTrainedModel, tokenizer: Any, end_id: int | None
) -> dict[str, Any]:
    """What goes before the generation config of `model`."""
    from llmq.inference.decoding import ending_also_at

    stored = model.generation_config
    assert stored is not None
    overrides: dict[str, Any] = {
        "do_sample": writing_options.is_sampled(args),
        "return_dict_in_generate": False,
        "output_scores": False,
        "output_logits": False,
        "output_attentions": False,
        "output_hidden_states": False,
    }
    if writing_options.is_sampled(args):
        given = {name: getattr(args, name) for name in ("temperature", "top_p", "top_k")}
        overrides |= {name: value for name, value in given.items() if value is not None}
    if stored.stop_strings or stored.token_healing:
        overrides["tokenizer"] = tokenizer
    overrides |= ending_also_at(stored, end_id)
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


def _end(row: Sequence[int], n_prompt: int, settings: Mapping[str, Any]) -> int:
    """Where a text ends: behind its first end of sequence, else before what fills its row up."""
    from llmq.inference.decoding import end_ids

    ids = set(end_ids(settings["eos_token_id"]))
    end = next((i + 1 for i in range(n_prompt, len(row)) if row[i] in ids), None)
    if end is not None:
        return end
    end, is_alone = len(row), (settings["num_return_sequences"] or 1) == 1
    while end > n_prompt and (
        row[end - 1] < 0 or (row[end - 1] == settings["pad_token_id"] and not is_alone)
    ):
        end -= 1
    return end


def speed(model: PreTrainedModel, n_new: int, seconds: float) -> dict[str, Any]:
    """Tokens, seconds, and what they make."""
    weight_bytes = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    rate = n_new / seconds if n_new else 0.0
    return {
        "new_tokens": n_new,
        "seconds": seconds,
        "tokens_per_second": rate,
        "weight_gb_per_second": rate * weight_bytes / 1e9,
    }


def tell_speed(found: Mapping[str, Any], remark: str = "") -> None:
    """A line on stderr."""
    print(
        f"{found['new_tokens']} tokens in {found['seconds']:.2f} s: "
        f"{found['tokens_per_second']:.1f} tokens/s, {found['weight_gb_per_second']:.2f} GB/s of "
        f"weights{remark}",
        file=sys.stderr,
    )
