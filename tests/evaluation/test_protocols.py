"""Every protocol against a plain computation of its own: one window at a time, nothing but
transformers."""

import copy
import math
import re

import pytest
import torch
from conftest import make_model
from tokenizers.processors import TemplateProcessing

import llmq
from llmq.errors import LlmqError
from llmq.evaluation.protocols import PROTOCOLS, llamacpp, protocol_named, strided, words

TEXT = "\n".join(f"line {i}: value = {i * i % 97}" for i in range(120))
DOCUMENTS = [
    " = A title = \n\n Some words , a few @-@ more ( in brackets ) and 1 @,@ 000 . \n",
    "",
    "a",
    "\n".join(f"line {i} : value ; {i * 7 % 13}" for i in range(60)),
]


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def adding(tokenizer):
    """A tokenizer that puts BOS before a text by itself."""
    other = copy.deepcopy(tokenizer)
    other.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    return other


@torch.no_grad()
def log_probability(model, tokens, first):
    """Of the tokens from `first` on, given those before, in nats."""
    row = torch.tensor([tokens])
    logits = model(row[:, :-1]).logits[0].double()
    found = torch.log_softmax(logits, -1)
    return float(sum(found[i - 1, row[0, i]] for i in range(first, len(tokens))))


def ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def text_bytes(tokenizer, tokens):
    return len(tokenizer.decode(tokens).encode())


def check(result, total, count, n_bytes):
    """A figure against a sum of log-probabilities and what it is divided by."""
    assert result.value == pytest.approx(math.exp(-total / count), rel=1e-4)
    assert result.ci95[0] < result.value < result.ci95[1]
    assert result.bits_per_byte == pytest.approx(-total / math.log(2) / n_bytes, rel=1e-4)


@pytest.mark.parametrize("length", [32, 48])
def test_gptq(model, tokenizer, length):
    result = llmq.perplexity(model, tokenizer, TEXT, sequence_length=length)
    row, total, count, n_bytes = ids(tokenizer, TEXT), 0.0, 0, 0
    for start in range(0, len(row) - length + 1, length):
        window = row[start : start + length]
        total += log_probability(model, window, 1)
        count += length - 1
        n_bytes += text_bytes(tokenizer, window[1:])
    check(result, total, count, n_bytes)
    assert result.windows.n_targets == count


@pytest.mark.parametrize(("length", "stride"), [(32, 16), (48, 7), (32, 32)])
def test_strided(model, tokenizer, length, stride):
    """The loop of the guide: labels of what the window before had seen are -100."""
    result = llmq.perplexity(
        model, tokenizer, TEXT, protocol="strided", sequence_length=length, stride=stride
    )
    row = torch.tensor([ids(tokenizer, TEXT)])
    total, count, n_bytes, previous_end = 0.0, 0, 0, 0
    for begin in range(0, row.shape[1], stride):
        end = min(begin + length, row.shape[1])
        labels = row[:, begin:end].clone()
        labels[:, : -(end - previous_end)] = -100
        real = int((labels[:, 1:] != -100).sum())
        if real:
            with torch.no_grad():
                loss = model(input_ids=row[:, begin:end], labels=labels).loss
            total -= float(loss) * real
            count += real
            n_bytes += text_bytes(tokenizer, row[0, end - real : end])
        previous_end = end
        if end == row.shape[1]:
            break
    check(result, total, count, n_bytes)
    if stride < length:  # then all but the first token are scored
        assert count == row.shape[1] - 1
    report = result.to_json()
    assert (report["protocol"], report["stride"], report["tokens"]) == ("strided", stride, count)
    assert (report["sequence_length"], report["bos"]) == (length, "none")


@pytest.mark.parametrize("length", [32, 33])
@pytest.mark.parametrize("adds_bos", [True, False])
def test_llamacpp(model, tokenizer, adding, length, adds_bos):
    """The loop of llama-perplexity: the position of each token from the middle on is asked for the
    next one."""
    reader = adding if adds_bos else tokenizer
    text = f"{TEXT}\n"
    result = llmq.perplexity(model, reader, text, protocol="llamacpp", sequence_length=length)
    row = ([0] if adds_bos else []) + ids(tokenizer, TEXT)
    total, count, n_bytes = 0.0, 0, 0
    for chunk in range(len(row) // length):
        window = row[chunk * length : (chunk + 1) * length]
        if adds_bos:
            window[0] = 0
        with torch.no_grad():
            found = torch.log_softmax(model(torch.tensor([window])).logits[0].double(), -1)
        for i in range(length // 2, length - 1):
            total += float(found[i, window[i + 1]])
            count += 1
        n_bytes += text_bytes(tokenizer, window[length // 2 + 1 :])
    check(result, total, count, n_bytes)
    report = result.to_json()
    assert (report["tokens"], report["sequence_length"]) == (count, length)
    assert report["bos"] == ("every-window" if adds_bos else "none")


def detokenised(text):
    """What is written in `DOCUMENTS`, by hand."""
    if text.startswith(" = A"):
        return " = A title =\n\nSome words, a few-more (in brackets) and 1,000.\n"
    return re.sub(r" (?=[:;] )", "", text)


@pytest.mark.parametrize("length", [16, 24, 128])
def test_words(model, tokenizer, length):
    """The rolling windows of lm-eval: a document's tokens in blocks, each with one token of
    context, the last block with as many as there is place for."""
    result = llmq.perplexity(
        model, DOCUMENTS, tokenizer=tokenizer, protocol="words", sequence_length=length
    )
    total, n_tokens = 0.0, 0
    scored = [text for text in DOCUMENTS if text]
    for text in scored:
        row = ids(tokenizer, detokenised(text))
        blocks = [row[i : i + length] for i in range(0, len(row), length)]
        for number, block in enumerate(blocks):
            before = [0] + [token for each in blocks[:number] for token in each]
            room = length + 1 - len(block) if number else 1
            context = before[-room:]
            total += log_probability(model, context + block, len(context))
        n_tokens += len(row)
    count = sum(len(re.split(r"\s+", text)) for text in scored)
    check(result, total, count, sum(len(text.encode()) for text in scored))
    assert result.word_perplexity == pytest.approx(result.value, rel=1e-12)
    assert result.token_perplexity == pytest.approx(math.exp(-total / n_tokens), rel=1e-4)
    report = result.to_json()
    assert (report["unit"], report["bos"], report["tokens"]) == ("word", "start", n_tokens)
    assert (report["documents"], report["documents_without_tokens"]) == (3, 1)
    assert report["detokenised"] is True
    assert report["byte_perplexity"] == pytest.approx(2 ** report["bits_per_byte"])


def test_words_reads_a_text_without_marks_of_wikitext_as_it_is(model, tokenizer):
    text = "def f(x) :\n    return [ x , 1 ]\n"
    windows = llmq.evaluation_windows(model, text, tokenizer=tokenizer, protocol="words")
    n_tokens = len(ids(tokenizer, text))
    assert windows.tokens[0, 1:n_tokens].tolist() == ids(tokenizer, text)[:-1]
    assert windows.identity()["detokenised"] is False
    assert windows.parts.n_bytes.tolist() == [len(text)]


def test_words_without_bos_does_not_score_the_first_token(model, tokenizer):
    found = [
        llmq.perplexity(
            model, DOCUMENTS, tokenizer=tokenizer, protocol="words", sequence_length=16, bos=bos
        )
        for bos in ("auto", "none", "every-window")
    ]
    counts = [each.windows.n_targets for each in found]
    assert [each.windows.bos for each in found] == ["start", "none", "every-window"]
    # "a" is one token, which nothing predicts then.
    assert (counts[0] - counts[1], counts[2]) == (3, counts[0])
    assert bool((found[2].windows.tokens[:, 0] == 0).all())
    assert found[1].windows.n_parts == 2


def test_words_takes_eos_where_there_is_no_bos(model, tokenizer):
    other = copy.deepcopy(tokenizer)
    other.bos_token = None
    windows = llmq.evaluation_windows(model, DOCUMENTS, tokenizer=other, protocol="words")
    assert windows.bos == "start (EOS)"
    assert int(windows.tokens[0, 0]) == 0


@pytest.mark.parametrize("protocol", ["strided", "llamacpp"])
def test_bos_of_every_window_takes_its_first_place(model, adding, protocol):
    windows = {
        bos: llmq.evaluation_windows(
            model, TEXT, tokenizer=adding, protocol=protocol, sequence_length=32, bos=bos
        )
        for bos in ("every-window", "start", "none")
    }
    assert {bos: each.bos for bos, each in windows.items()} == dict(
        zip(windows, windows, strict=True)
    )
    assert bool((windows["every-window"].tokens[:, 0] == 0).all())
    assert int((windows["start"].tokens[:, 0] == 0).sum()) == 1
    assert not bool((windows["none"].tokens[:, 0] == 0).any())
    assert torch.equal(windows["every-window"].targets, windows["start"].targets)


def test_gptq_says_start_only_where_the_tokenizer_adds_bos(model, tokenizer, adding):
    for reader, policy in ((tokenizer, "none"), (adding, "start")):
        for bos in ("auto", "start"):
            windows = llmq.evaluation_windows(
                model, TEXT, tokenizer=reader, sequence_length=32, bos=bos
            )
            assert windows.identity()["bos"] == policy


@pytest.mark.parametrize("name", PROTOCOLS)
def test_the_protocols_are_those_of_their_files(name):
    assert protocol_named(name).name == name


def test_spans():
    def told(spans):
        return [(span.start, span.first, span.end) for span in spans]

    assert told(strided.spans_of(10, 4, 2)) == [(0, 1, 4), (2, 4, 6), (4, 6, 8), (6, 8, 10)]
    assert told(strided.spans_of(9, 4, 4)) == [(0, 1, 4), (4, 5, 8)]  # one token predicts nothing
    assert told(llamacpp.spans_of(11, 4)) == [(0, 3, 4), (4, 7, 8)]
    assert told(words.spans_of(10, 4)) == [(0, 1, 5), (4, 5, 9), (5, 9, 10)]
    assert told(words.spans_of(1, 4)) == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"protocol": "strided"}, r"3 tokens, but protocol strided needs 32; give more text"),
        ({"protocol": "llamacpp"}, r"3 tokens, but protocol llamacpp needs 64; give more text"),
        ({"protocol": "gptq"}, r"3 tokens, but one window needs 32"),
        ({"protocol": "words", "bos": "none"}, "needs 1 document with a token to predict, found 0"),
        ({"protocol": "words", "stride": 4}, "--stride 4: protocol words has none"),
        ({"protocol": "strided", "stride": 33}, "--stride 33: expected 1 to 32"),
        ({"protocol": "strided", "stride": "8"}, "stride: expected a whole number of tokens"),
        ({"protocol": "llamacpp", "sequence_length": 2}, "needs windows of 3 tokens or more"),
        ({"protocol": "llamacpp", "sequence_length": 129}, "positions for 128 tokens only"),
        ({"protocol": "stride"}, "expected gptq, strided, llamacpp or words.*did you mean strided"),
    ],
    ids=str,
)
def test_what_cannot_be_scored_is_refused(model, tokenizer, settings, message):
    text = "\n" if settings.get("bos") == "none" else "a b c"
    assert len(ids(tokenizer, "a b c")) == 3
    with pytest.raises(LlmqError, match=message):
        llmq.perplexity(model, text, tokenizer=tokenizer, **{"sequence_length": 32, **settings})


def test_token_ids_have_no_other_protocol(model):
    with pytest.raises(LlmqError, match="protocol strided reads texts, got token ids"):
        llmq.perplexity(model, list(range(64)), protocol="strided", sequence_length=32)
    report = llmq.perplexity(model, list(range(64)), sequence_length=32).to_json()
    assert (report["bits_per_byte"], report["bos"]) == (None, "as given")


def test_windows_keep_their_protocol(model, tokenizer):
    windows = llmq.evaluation_windows(
        model, TEXT, tokenizer=tokenizer, protocol="strided", sequence_length=32
    )
    found = llmq.perplexity(model, windows)
    assert found.to_json()["protocol"] == "strided"
    assert llmq.perplexity(model, windows, protocol="strided").value == found.value
    with pytest.raises(LlmqError, match="windows of protocol strided, asked to be scored by words"):
        llmq.perplexity(model, windows, protocol="words")


@pytest.mark.parametrize(("protocol", "length"), [("llamacpp", 512), ("strided", 2048)])
def test_usual_settings(protocol, length):
    config = make_model(max_position_embeddings=4096).config
    found = protocol_named(protocol).settings(config, None, None, "auto")
    assert found.sequence_length == length
    assert found.stride == (512 if protocol == "strided" else None)
    short = protocol_named(protocol).settings(make_model().config, None, None, "auto")
    assert (short.sequence_length, short.stride) == (128, 64 if protocol == "strided" else None)


def test_first_windows_are_whole_documents(model, tokenizer):
    windows = llmq.evaluation_windows(
        model, DOCUMENTS, tokenizer=tokenizer, protocol="words", sequence_length=16
    )
    of_window = windows.parts.of_window.tolist()
    first = windows.first(of_window.count(0) + 2)  # the second has one, the third many
    assert first.identity()["documents"] == 3
    assert len(first.tokens) == len(windows.tokens)
    first = windows.first(1)
    assert (first.n_parts, len(first.tokens)) == (1, of_window.count(0))
    assert len(first.parts.n_words) == len(first.parts.n_bytes) == 1
    strided_windows = llmq.evaluation_windows(
        model, TEXT, tokenizer=tokenizer, protocol="strided", sequence_length=32
    ).first(3)
    assert len(strided_windows.tokens) == len(strided_windows.targets) == 3
    assert len(strided_windows.parts.n_bytes) == 3
