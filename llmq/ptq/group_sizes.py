"""One group size for all layers of a rule, for formats whose readers take no other."""

from __future__ import annotations

from dataclasses import replace

from llmq.recipe import LayerPlan, Recipe


def with_one_group_size(plans: list[LayerPlan], recipe: Recipe) -> list[LayerPlan]:
    """Plans in which all layers of a rule have the smallest group size that one of them needs,
    because the rule's own does not divide its K. Layers that it does not divide stay as they
    are."""
    smallest: dict[int, int] = {}
    for plan in plans:
        if plan.spec is not None and plan.spec.group_size > 0:
            rule = _rule_of(plan, recipe)
            size = plan.spec.group_size
            smallest[rule] = min(size, smallest.get(rule, size))
    return [_with_size(plan, recipe, smallest) for plan in plans]


def _with_size(plan: LayerPlan, recipe: Recipe, smallest: dict[int, int]) -> LayerPlan:
    rule = _rule_of(plan, recipe)
    asked = recipe.rules[rule].spec if rule < len(recipe.rules) else None
    if plan.spec is None or asked is None or rule not in smallest:
        return plan
    size = smallest[rule]
    if size == asked.group_size or plan.layer.shape[1] % size:
        return plan
    note = (
        f"group size {size} instead of {asked.group_size}, which does not divide the columns of "
        "some layers of the rule: the format's readers take one size for all"
    )
    return replace(plan, spec=replace(plan.spec, group_size=size), note=note)


def _rule_of(plan: LayerPlan, recipe: Recipe) -> int:
    """The place of the rule that decides a layer."""
    for i, rule in enumerate(recipe.rules):
        if rule.matches(plan.layer.name):
            return i
    return len(recipe.rules)
