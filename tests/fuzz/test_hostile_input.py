"""No input makes a command raise, hang, die or litter: mutated folders of every format, recipes,
texts and values on the command line.

LLMQ_FUZZ_INPUTS and LLMQ_FUZZ_SEED give another number of inputs and others of them."""

import os

import pytest
from fuzz import campaign
from fuzz.folders import make_folders


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    root = tmp_path_factory.mktemp("bases")
    make_folders(root)
    return root


@pytest.mark.parametrize(
    "n_inputs", [150, pytest.param(20_000, marks=pytest.mark.slow)], ids=["few", "many"]
)
def test_mutated_inputs_end_in_results_or_refusals(n_inputs, bases, tmp_path, capsys):
    n_inputs = int(os.environ.get("LLMQ_FUZZ_INPUTS", n_inputs))
    findings = campaign.run(os.environ.get("LLMQ_FUZZ_SEED", "1"), n_inputs, bases, tmp_path)
    with capsys.disabled():
        print(f"\n{findings.table()}")
    assert not findings.bad
    assert sum(findings.counts.values()) == n_inputs
    assert {outcome for _, outcome in findings.counts} == {"ok", "refused"}
