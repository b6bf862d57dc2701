"""A run that is refused for its input leaves nothing that would have to be removed by hand."""

import json

import pytest

from llmq.commands import cli
from llmq.errors import LlmqError
from llmq.grid.spec import QuantSpec
from llmq.qat.settings import QATSettings, Scheme


def test_weights_that_do_not_fit_leave_no_work_folder(
    model_folder, calibration_file, tmp_path, capsys
):
    folder = model_folder()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 96}))
    command = ["qat", str(folder), str(tmp_path / "out"), "--train", str(calibration_file)]
    command += ["--sequence-length", "16", "--batch-size", "1", "--max-steps", "1"]
    command += ["--init", "rtn", "--precision", "fp32", "--held-out", "0", "--device", "cpu"]
    assert cli.main(command) == 2
    assert "does not belong to these weights" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [folder]


def test_a_start_by_no_method_is_refused():
    with pytest.raises(LlmqError, match=r"expected the method rtn, .* got 'smoothquant', which co"):
        QATSettings(Scheme(QuantSpec()), init="smoothquant")
