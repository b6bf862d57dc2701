"""What to do with each layer: ordered rules from name patterns to specs, the method, the data and
the seed. The first rule that matches a layer decides.

A pattern is a shell pattern on the module's name (`*.down_proj`, `model.layers.0.*`), or a regular
expression after `re:`. A rule that matches nothing is an error, because it is a typo."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from llmq import patterns
from llmq.arguments import check_type, refused
from llmq.errors import LlmqError
from llmq.fields import check_fields
from llmq.grid.scheme import parse_treatment
from llmq.grid.spec import ActSpec, QuantSpec

KEEP = "keep"
EVERY = "*"  # the pattern of a rule about all layers
OUTSIDE = ("embeddings", "head")  # fields of a recipe, for what is in no block
MAX_RULES = 10_000
MAX_TOKENS = 1 << 40
MAX_STEPS = 1_000_000
BY_METHOD: Any = None  # the default of fields whose value goes by the method, see `defaults_of`
# What was measured, see the README of `llmq/ptq`.
_DEFAULTS: dict[str, Any] = {"token_weights": "equal", "scale_steps": 0}
_DEFAULTS_OF: dict[str, dict[str, Any]] = {
    "blockwise": {"token_weights": "fisher", "scale_steps": 36},
}
_DAMPING = {"equal": 0.1, "fisher": 0.5}  # fewer tokens count where they are weighed
_RULE_FORMS = "expected 'PATTERN=SPEC', or a pair of a pattern and a spec"


@dataclass(frozen=True)
class Rule:
    """pattern: which layers. spec: how they are quantized, or None to keep them in full
    precision."""

    pattern: str
    spec: QuantSpec | None

    def __post_init__(self) -> None:
        patterns.check_length(self.pattern, "rule")
        if self.pattern.startswith("re:"):
            patterns.check(self.pattern[3:], f"rule {self.pattern!r}")
        if not isinstance(self.spec, QuantSpec | None):
            raise LlmqError(
                f"rule {self.pattern!r}: expected a QuantSpec, or None to keep, got "
                f"{type(self.spec).__name__}"
            )

    def matches(self, name: str) -> bool:
        """Whether the rule is about the layer of that name. Raises `LlmqError` for a pattern that
        takes too long."""
        where = f"rule {self.pattern!r}"
        if self.pattern.startswith("re:"):
            return patterns.searches(self.pattern[3:], name, where)
        return patterns.matches_shell(self.pattern, name, where)

    @classmethod
    def parse(cls, text: str) -> Rule:
        """Read `PATTERN=SPEC`, such as `*.down_proj=w8` or `model.layers.0.*=keep`."""
        check_type("rule", text, str, "a text PATTERN=SPEC, such as '*.down_proj=w8'")
        pattern, separator, spec = text.rpartition("=")
        if not separator or not pattern:
            raise LlmqError(
                f"rule {text!r}: expected PATTERN=SPEC, such as '*.down_proj=w8' or "
                "'model.layers.0.*=keep'"
            )
        return cls(pattern, _weights_of(spec, text))


def _weights_of(spec: str, rule: str) -> QuantSpec | None:
    """The spec of a rule's text, None to keep."""
    if spec == KEEP:
        return None
    weights, activations = parse_treatment(spec)
    if not activations.is_none:
        raise LlmqError(
            f"rule {rule!r}: activations are treated alike in all layers; give the weights alone, "
            f"{weights}"
        )
    return weights


@dataclass(frozen=True)
class Layer:
    """A linear layer that could be quantized: module name and weight shape `(N, K)`. is_transposed:
    whether the model computes with `[K, N]`, as GPT-2 does. kept: why it stays in full precision
    unless a rule is about such layers alone, empty for most."""

    name: str
    shape: tuple[int, int]
    is_transposed: bool = False
    kept: str = ""


@dataclass(frozen=True)
class LayerPlan:
    """What happens to one layer. spec None keeps it in full precision. note: why it differs from
    what its rule asks for, empty when it does not. role: of a matrix that lies outside of the
    blocks, see `llmq.models.outside`; empty for their layers."""

    layer: Layer
    spec: QuantSpec | None
    note: str = ""
    role: str = ""

    @property
    def differs(self) -> bool:
        """Whether it is not what was asked for; what is kept by default has a note, too."""
        return bool(self.note) and not (self.spec is None and self.layer.kept)


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the result, apart from the model, what its texts say and, where
    `autocast` is None, the machine.

    rules: ordered; the first that matches a layer decides.
    method: its name in `llmq.ptq.methods`, which says what goes with it.
    init: what method "blockwise" starts from.
    order: the column order of GPTQ (see `llmq.ptq.methods.gptq`).
    damping: share of the median diagonal that is added to the Hessian (None, as for the two below:
        see `defaults_of`).
    search: choose scales by Hessian-weighted error, not by range.
    sweeps: passes of coordinate descent after GPTQ (see `llmq.ptq.methods.refine`).
    inputs: where layers are measured: on the "quantized" outputs of the blocks before, on the
        "full-precision" ones, or on "both", which corrects for what was lost before (GPTAQ).
    alpha: the share of that correction.
    token_weights: whether errors at all tokens count alike ("equal") or by what they do to the
        model ("fisher", see `llmq.ptq.token_weights`).
    all_experts: measure every expert on all tokens instead of on those that are routed to it.
    calibration: the text, as `--calibration` names it; None: by `llmq.ptq.sizing.default_text`.
    samples, sequence_length, seed: the calibration windows.
    iterations, learning_rate: steps per block of block-wise tuning, and their size as a share of
        the distance between two codes.
    tune_zero_points: it trains these, too.
    scale_steps: steps in which the scales of all blocks are trained together when these are done
        (see `llmq.ptq.scale_tuning`); 0 for none.
    autocast: blocks run in bfloat16 meanwhile (None: see `llmq.ptq.precision`).
    activations: their treatment at inference.
    activation_range: how static ranges are chosen (see `llmq.activations.ranges`).
    embeddings, head: how these are quantized, None to keep them as they are; where they are one
        tensor, one of them says it (see `llmq.ptq.outside`)."""

    rules: tuple[Rule, ...] = (Rule("*", QuantSpec()),)
    method: str = "gptq"
    init: Literal["rtn", "gptq"] = "gptq"
    order: Literal["group", "static", "none", "act"] = "group"
    damping: float = BY_METHOD
    search: bool = True
    sweeps: int = 2
    inputs: Literal["quantized", "full-precision", "both"] = "both"
    alpha: float = 0.5
    token_weights: Literal["equal", "fisher"] = BY_METHOD
    all_experts: bool = False
    calibration: str | None = None
    samples: int = 128
    sequence_length: int = 2048
    seed: int = 0
    iterations: int = 45
    learning_rate: float = 0.02
    tune_zero_points: bool = False
    scale_steps: int = BY_METHOD
    autocast: bool | None = None
    activations: ActSpec = field(default_factory=ActSpec)
    activation_range: Literal["minmax", "percentile", "mse"] = "mse"
    embeddings: QuantSpec | None = None
    head: QuantSpec | None = None

    def __post_init__(self) -> None:
        for name in defaults_of(self.method):  # what tokens count before what follows from it
            if getattr(self, name) is None:
                object.__setattr__(self, name, self._defaults[name])
        self._check_types()
        self._check_shares()
        self._check_windows()
        if self.sweeps < 0:
            raise LlmqError(f"sweeps {self.sweeps}: expected 0 (plain GPTQ) or more")
        if not 0 <= self.scale_steps <= MAX_STEPS:
            raise LlmqError(
                f"scale steps {self.scale_steps}: expected 0 (the scales stay as they are solved) "
                f"to {MAX_STEPS}"
            )
        if self.iterations < 1:
            raise LlmqError(
                f"iterations {self.iterations}: expected 1 or more steps per block; use --method "
                "gptq for none"
            )

    def _check_shares(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise LlmqError(
                f"alpha {self.alpha}: expected a share of the correction, from 0 to 1 (0.5 is "
                "usual)"
            )
        if not 0 < self.damping <= 1:
            raise LlmqError(
                f"damping {self.damping}: expected a share of the median diagonal, above 0 and at "
                "most 1 (0.1 is usual)"
            )
        if not 0 < self.learning_rate <= 1:
            raise LlmqError(
                f"learning rate {self.learning_rate}: expected a share of a step between two "
                "codes, above 0 and at most 1 (0.02 is usual)"
            )

    def _check_windows(self) -> None:
        if not 0 <= self.seed < 1 << 63:
            raise LlmqError(f"seed {self.seed}: expected a whole number from 0 to 2^63 - 1")
        windows = f"calibration of {self.samples} samples of {self.sequence_length} tokens"
        if self.samples < 1 or self.sequence_length < 2:
            raise LlmqError(f"{windows}: expected at least 1 sample of 2 tokens")
        if self.samples * self.sequence_length > MAX_TOKENS:
            raise LlmqError(f"{windows}: expected at most {MAX_TOKENS} tokens together")

    def _check_types(self) -> None:
        """Recipes come from JSON, too, where every value can be of any type."""
        check_fields(self)
        if not (
            isinstance(self.rules, tuple) and all(isinstance(rule, Rule) for rule in self.rules)
        ):
            raise LlmqError(f"rules {self.rules!r}: expected a tuple of Rule")
        if not isinstance(self.activations, ActSpec):
            raise LlmqError(f"activations {self.activations!r}: expected an ActSpec")
        for name in OUTSIDE:
            if not isinstance(spec := getattr(self, name), QuantSpec | None):
                raise LlmqError(f"{name} {spec!r}: expected a QuantSpec, or None to keep them")
        if len(self.rules) > MAX_RULES:
            raise LlmqError(
                f"{len(self.rules)} rules: expected at most {MAX_RULES}; patterns with * cover "
                "many layers"
            )

    @classmethod
    def uniform(cls, spec: str | QuantSpec, **options: Any) -> Recipe:
        """One spec for every layer, or one scheme: `Recipe.uniform("w4g128", method="gptq")`,
        `Recipe.uniform("W8A8")`."""
        if isinstance(spec, str):
            spec, activations = parse_treatment(spec)
            if not activations.is_none:
                options.setdefault("activations", activations)
        elif not isinstance(spec, QuantSpec):
            raise refused("spec", spec, "a QuantSpec, or a text such as w4g128 or W4A16")
        return cls(rules=(Rule("*", spec),), **options)

    def changed(self, **fields: Any) -> Recipe:
        """With other values of some fields. Where these name another method, what stood at the
        default of the old one takes the new one's."""
        follow = {name: None for name in self._defaults if self.is_default(name)}
        return replace(self, **{**follow, **fields})

    def is_default(self, name: str) -> bool:
        """Whether a field that goes by the method is what the method decides."""
        return bool(getattr(self, name) == self._defaults[name])

    @property
    def _defaults(self) -> dict[str, Any]:
        return defaults_of(self.method, self.token_weights)

    def plan(self, layers: Iterable[Layer]) -> list[LayerPlan]:
        """Decide every layer. Raises `LlmqError` when a rule matches no layer."""
        layers = list(layers)
        of_kept = set()  # the rules that are about layers that are kept by default, and no others
        for rule in self.rules:
            matched = [layer for layer in layers if rule.matches(layer.name)]
            if not matched:
                examples = ", ".join(layer.name for layer in layers[:3])
                raise LlmqError(
                    f"rule {rule.pattern!r} matches none of the {len(layers)} linear layers; their "
                    f"names look like {examples}"
                )
            if all(layer.kept for layer in matched):
                of_kept.add(rule)
        return [self._plan_layer(layer, of_kept) for layer in layers]

    def takes_part(self, plan: LayerPlan) -> bool:
        """Whether a layer is quantized by a rule about all layers (`*`), whose bits a budget
        chooses."""
        deciding = next((rule for rule in self.rules if rule.matches(plan.layer.name)), None)
        return plan.spec is not None and deciding is not None and deciding.pattern == EVERY

    def _plan_layer(self, layer: Layer, of_kept: Collection[Rule]) -> LayerPlan:
        rule = next((rule for rule in self.rules if rule.matches(layer.name)), None)
        if rule is None or (asked := rule.spec) is None:
            return LayerPlan(layer, None)
        if layer.kept and rule not in of_kept:
            leaf = layer.name.rpartition(".")[2]
            remedy = f"a rule about such layers alone quantizes them: '*.{leaf}=w8'"
            return LayerPlan(layer, None, f"kept in full precision: {layer.kept}; {remedy}")
        fitting = asked.fit(layer.shape[1])
        if fitting is None:
            return LayerPlan(
                layer,
                None,
                "kept in full precision: no group size of 128, 64 or 32 at or below "
                f"{asked.group_size} divides K = {layer.shape[1]}",
            )
        if fitting != asked:
            return LayerPlan(
                layer,
                fitting,
                f"group size {fitting.group_size} instead of {asked.group_size}, which does not "
                f"divide K = {layer.shape[1]}",
            )
        return LayerPlan(layer, fitting)

    def to_json(self) -> dict[str, Any]:
        return {
            **asdict(self),
            "rules": [
                [rule.pattern, None if rule.spec is None else rule.spec.to_json()]
                for rule in self.rules
            ],
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Recipe:
        """The inverse of `to_json`. Raises `LlmqError` for keys that do not exist and values that
        make no recipe."""
        if not isinstance(data, dict):
            raise LlmqError(
                "recipe: expected an object with some of the keys "
                f"{', '.join(cls.__dataclass_fields__)}, got {type(data).__name__}"
            )
        unknown = set(data) - set(cls.__dataclass_fields__)
        if unknown:
            raise LlmqError(
                f"recipe: unknown keys {', '.join(sorted(map(str, unknown)))}; known are "
                f"{', '.join(cls.__dataclass_fields__)}"
            )
        values = dict(data)
        known = defaults_of(values.get("method", cls.method), values.get("token_weights"))
        for name in known:
            if name in values and values[name] is None:
                raise LlmqError(
                    f"recipe: {name} null: leave it out for what goes with the method, "
                    f"{known[name]}"
                )
        try:
            if "rules" in values:
                values["rules"] = rules_of(values["rules"])
            if "activations" in values:
                values["activations"] = ActSpec.from_json(values["activations"])
            for name in OUTSIDE:
                if name in values:
                    values[name] = outside_spec(values[name], name)
        except LlmqError as error:
            raise LlmqError(f"recipe: {error}") from None
        return cls(**values)


def defaults_of(method: str, token_weights: str | None = None) -> dict[str, Any]:
    """The fields of a recipe whose defaults go by the method, transforms aside, and these.
    token_weights: where they are chosen, for the damping goes by them."""
    found = _DEFAULTS | _DEFAULTS_OF.get(str(method).rpartition("+")[2], {})
    weights = token_weights or found["token_weights"]
    return {**found, "damping": _DAMPING.get(str(weights), _DAMPING["equal"])}


def outside_spec(data: Any, name: str) -> QuantSpec | None:
    """How embeddings or head are quantized: a spec, its text or its object as a report holds it;
    None or "keep" to keep them. name: of the field. Raises `LlmqError`."""
    if data is None or data == KEEP or isinstance(data, QuantSpec):
        return None if data == KEEP else data
    try:
        if isinstance(data, str):
            return QuantSpec.parse(data)
        return QuantSpec.from_json(data)
    except LlmqError as error:
        raise LlmqError(f"{name}: {error}") from None


def rules_of(data: Any) -> tuple[Rule, ...]:
    """The rules of a recipe file: each a text `PATTERN=SPEC`, or a pair of a pattern and a spec, as
    a report holds them. Raises `LlmqError` that names the rule by its place."""
    if not isinstance(data, list | tuple):
        raise LlmqError(f"rules {data!r}: expected a list; {_RULE_FORMS}")
    rules = []
    for i, rule in enumerate(data):
        try:
            rules.append(_rule_of(rule))
        except LlmqError as error:
            raise LlmqError(f"rules[{i}]: {error}") from None
    return tuple(rules)


def _rule_of(data: Any) -> Rule:
    if isinstance(data, str):
        return Rule.parse(data)
    if not (isinstance(data, list | tuple) and len(data) == 2):
        raise LlmqError(f"rule {data!r}: {_RULE_FORMS}")
    pattern, spec = data
    if isinstance(spec, str):
        return Rule(pattern, None if spec == KEEP else QuantSpec.parse(spec))
    return Rule(pattern, None if spec is None else QuantSpec.from_json(spec))
