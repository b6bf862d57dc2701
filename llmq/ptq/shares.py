"""What each of several processes takes that quantize one model together, from shapes alone: what
it sends, what it keeps on disk, and its time. Estimates."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import log2

from llmq.activations.ranges import SAMPLES_PER_BATCH
from llmq.models.arch import find_blocks
from llmq.models.experts import DOWN, token_shares, unfused_in
from llmq.models.site import fused_names
from llmq.ptq.budget import SOLVE_FACTOR, disk_bytes, flops, tuning_flops, work_bytes
from llmq.ptq.expert_costs import expert_of
from llmq.ptq.job import Job
from llmq.ptq.leaves import Leaves
from llmq.ptq.methods import method_of
from llmq.ptq.ranks import check_size
from llmq.ptq.streams import batch_size

# Of a layer's report and results beside their tensors, and of what is told of a group's sums.
RESULT_BYTES, COUNT_BYTES = 1300, 32
TUNED_BYTES = 1300  # of a tuned layer's report beside its tensors

Groups = dict[tuple[str, ...], list[tuple[int, int]]]


@dataclass(frozen=True)
class Share:
    """n_processes: that share the work. sent_bytes: of all of them together. work_bytes: of the
    hidden states of one. first_disk_bytes: of the first one, which writes. flops: of the one that
    has most to do, weighed as in `budget.flops`."""

    n_processes: int
    sent_bytes: int
    work_bytes: int
    first_disk_bytes: int
    flops: float

    @classmethod
    def of(cls, job: Job, n: int) -> Share:
        """Raises `LlmqError` for a number that cannot share."""
        check_size(n)
        work = work_bytes(job) // n
        others = disk_bytes(job) - work_bytes(job)
        if n > 1 and method_of(job.recipe).needs(job.recipe).tuning:
            others += _whole_bytes(job)
        return cls(n, _sent_bytes(job, n), work, others + work, _flops(job, n))

    def to_json(self) -> dict[str, float]:
        return asdict(self)


def _groups(job: Job) -> Groups:
    """Shapes of the layers that are measured together, by their names, of experts by module, number
    and which of its inputs."""
    experts = unfused_in(job.model)
    found: Groups = {}
    for plan in job.plans:
        if plan.spec is None:
            continue
        name = plan.layer.name
        key = fused_names(name)
        if (expert := expert_of(name, experts)) is not None:
            is_inner = name.endswith(f".{DOWN}")
            key = (expert[0], str(expert[1]), "inner" if is_inner else "inputs")
        found.setdefault(key, []).append(plan.layer.shape)
    return found


def _sent_bytes(job: Job, n: int) -> int:
    """Sums go up the tree once, results to everybody."""
    if n == 1:
        return 0
    needs = method_of(job.recipe).needs(job.recipe)
    groups = _groups(job)
    sums = _range_bytes(job, groups, n)
    for shapes in groups.values():
        k = shapes[0][1]
        cross = min(shapes[0]) if len(shapes) == 1 else k  # see `streams.narrows`
        sums += 4 * k * k + (4 * cross * k if needs.both_streams else 0) + COUNT_BYTES
    results = 0
    for plan in job.plans:
        if plan.spec is not None:
            rows, k = plan.layer.shape
            packed = int(rows * k * plan.spec.bits_per_weight(rows, k) / 8)
            # the errors of each row, of the result and of rounding
            results += packed + 16 * rows + RESULT_BYTES
            results += packed + TUNED_BYTES if needs.tuning else 0
    if job.recipe.token_weights != "equal":
        assert job.tokens is not None
        experts = unfused_in(job.model)
        dense = [key for key in groups if key[0] not in experts]
        sums += 4 * job.tokens.n_tokens * len(dense)
    tuned = _whole_bytes(job) * len(find_blocks(job.model)[1]) // n if needs.tuning else 0
    return (n - 1) * (sums + results + tuned)


def _range_bytes(job: Job, groups: Groups, n: int) -> int:
    """Samples of inputs, of which half go on with every step of the tree; over n - 1, as sums are
    counted. Experts add the rows of a leaf at once."""
    if job.recipe.activations.kind != "int8-static" or job.tokens is None:
        return 0
    n_sequences, length = job.tokens.tokens.shape
    shares = token_shares(job.model)
    batches = Leaves(n_sequences, batch_size(job.plans, length)).sizes
    leaves = Leaves(n_sequences, n_sequences).sizes
    n_samples = 0.0
    for (name, *_), shapes in groups.items():
        share = shares.get(name)
        values = length * (1.0 if share is None else share) * shapes[0][1]
        sizes = batches if share is None else leaves
        n_samples += sum(min(SAMPLES_PER_BATCH, size * values) for size in sizes)
    return int(4 * n_samples * log2(n) / 2 / (n - 1))


def _whole_bytes(job: Job) -> int:
    """What the first process has of all for a block that it tunes: inputs, targets, and the
    per-layer embeddings of models that have them."""
    assert job.tokens is not None
    config = job.model.config.get_text_config()
    per_layer = getattr(config, "hidden_size_per_layer_input", None) or 0
    states = (4 + job.precision("cpu").stream.itemsize) * config.hidden_size
    return int(job.tokens.n_tokens * (states + 4 * per_layer))


def _flops(job: Job, n: int) -> float:
    """Passes are shared. Solves of dense layers wait for each other, those of experts do not, and
    the first process tunes blocks alone."""
    experts, method = unfused_in(job.model), method_of(job.recipe)
    alone, together = tuning_flops(job), 0.0
    for plan in job.plans:
        if plan.spec is None:
            continue
        taken = SOLVE_FACTOR * method.solve_flops(plan.layer.shape)
        if expert_of(plan.layer.name, experts) is None:
            alone += taken
        else:
            together += taken
    passes = flops(job) - alone - together
    return alone + (passes + together) / n
