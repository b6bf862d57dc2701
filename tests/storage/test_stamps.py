"""A source that changes during a run is noticed, whatever changes."""

import json
import os
import shutil
import warnings
from pathlib import Path

import pytest

from llmq.commands.cli import main
from llmq.errors import LlmqError, LlmqWarning
from llmq.ptq.job import prepare
from llmq.ptq.run import quantize_folder
from llmq.qat import run as qat_run
from llmq.recipe import Recipe


def edit(path: Path) -> None:
    """In place, at the same size and time: in weights, of a layer of block 0 where there is one."""
    content, status = bytearray(path.read_bytes()), path.stat()
    at = len(content) - 3
    if path.suffix == ".safetensors":
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        starts = {name: entry["data_offsets"][0] for name, entry in header.items() if "." in name}
        name = min(starts, key=lambda name: (".layers.0.mlp." not in name, name))
        at = 8 + length + starts[name] + 1
    content[at] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def replace(path: Path) -> None:
    """By a file that looks the same."""
    copy = path.with_name("copy" + path.suffix)
    shutil.copy2(path, copy)
    edit(copy)
    copy.replace(path)


CHANGES = [edit, replace, Path.unlink]
NAMES = ["config.json", "tokenizer.json", "model-00001-of-00003.safetensors"]
LAYER = "model.layers.0.mlp.down_proj.weight"
NAMES += ["model.safetensors.index.json", "generation_config.json", "LICENSE"]


@pytest.fixture
def source(model_folder):
    folder = model_folder(num_hidden_layers=2, max_shard_size="400KB")
    (folder / "LICENSE").write_text("do as you like")
    (folder / "README.md").write_text("a model")
    assert all((folder / name).exists() for name in NAMES), sorted(os.listdir(folder))
    return folder


def run_with(source, out, change, at):
    """Quantize, with a change after block `at`."""
    return quantize_folder(
        prepare(str(source), Recipe.uniform("w4g32", method="rtn")),
        out,
        on_block=lambda report: change() if report.index == at else None,
    )


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_source_that_changes_during_a_run(source, tmp_path, change):
    kept = tmp_path / "kept"
    shutil.copytree(source, kept)
    index = json.loads((source / "model.safetensors.index.json").read_text())["weight_map"]
    for at, name in enumerate([*NAMES, index[LAYER]]):
        with pytest.raises(LlmqError, match=rf"{name}: is (gone|not the file that it was)"):
            run_with(source, tmp_path / "out", lambda name=name: change(source / name), at % 2)
        left = set(os.listdir(tmp_path)) - {"kept", "model"}
        # What the finished blocks were made of may still be there: then they are kept.
        assert left <= ({".out.llmq-partial"} if name.endswith(".safetensors") else set()), name
        shutil.rmtree(tmp_path / ".out.llmq-partial", ignore_errors=True)
        shutil.rmtree(source)
        shutil.copytree(kept, source)


def touch_inode(path: Path) -> None:
    path.chmod(0o600)


@pytest.mark.parametrize(("change", "n_kept"), [(edit, 0), (replace, 0), (touch_inode, 1)])
def test_contents_decide_where_size_and_time_are_the_same(source, tmp_path, change, n_kept):
    """Between two attempts, too: what was read is told by its hash."""
    index = json.loads((source / "model.safetensors.index.json").read_text())["weight_map"]
    shard, out = source / index[LAYER], tmp_path / "out"

    def stop():
        raise KeyboardInterrupt

    for on_block, error in ((stop, KeyboardInterrupt), (lambda: change(shard), LlmqError)):
        with pytest.raises(error):
            run_with(source, out, on_block, 0)
        if on_block is stop:
            change(shard)
        shutil.rmtree(tmp_path / "again", ignore_errors=True)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always", LlmqWarning)
            report = run_with(source, out, lambda: None, 0)
        assert report["resumed_at_block"] == n_kept
        assert n_kept == 1 or on_block is not stop or "starting over" in str(told[0].message)
        run_with(source, tmp_path / "again", lambda: None, 0)
        for path in out.glob("*.safetensors"):
            assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()
        shutil.rmtree(out)


def test_what_is_not_used_may_change(source, tmp_path):
    def change():
        edit(source / "README.md")
        (source / "training.log").write_text("something else")

    run_with(source, tmp_path / "out", change, 0)
    assert (tmp_path / "out" / "LICENSE").exists()


@pytest.mark.parametrize("name", ["tokenizer.json", "generation_config.json"])
def test_a_run_is_not_continued_with_another_tokenizer_or_config(source, tmp_path, name):
    def stop():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_with(source, tmp_path / "out", stop, 0)
    data = json.loads((source / name).read_text())
    (source / name).write_text(json.dumps(data, indent=1))  # other bytes, which would be copied
    with pytest.raises(LlmqError, match=rf"interrupted run with another model \({name}: "):
        run_with(source, tmp_path / "out", lambda: None, 9)


@pytest.mark.parametrize(("of", "when"), [("model", "train"), ("teacher", "ship")])
def test_fine_tuning_notices_it_too(
    model_folder, calibration_file, tmp_path, capsys, monkeypatch, of, when
):
    model, teacher = model_folder(), model_folder(name="teacher", seed=1)
    original = getattr(qat_run, when)

    def changed(*args, **options):
        edit({"model": model, "teacher": teacher}[of] / "model.safetensors")
        return original(*args, **options)

    monkeypatch.setattr(qat_run, when, changed)
    options = ["--teacher", str(teacher), "--train", str(calibration_file), "--init", "rtn"]
    options += ["--sequence-length", "32", "--batch-size", "4", "--max-steps", "1"]
    options += ["--group-size", "32", "--precision", "fp32", "--device", "cpu"]
    assert main(["qat", str(model), str(tmp_path / "out"), *options]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"{of}/model.safetensors: is not the file that it was" in error
    assert not (tmp_path / "out").exists()
