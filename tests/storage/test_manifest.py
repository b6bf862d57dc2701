"""What llmq wrote is what is there, or it is named."""

import itertools
import json
import os
import random
import shutil

import pytest

import llmq
from llmq.commands.cli import main
from llmq.errors import LlmqError, VerificationError
from llmq.ptq.job import prepare
from llmq.ptq.run import quantize_folder
from llmq.recipe import Recipe
from llmq.storage import manifest
from llmq.storage.files import MANIFEST


@pytest.fixture
def checkpoint(model_folder, tmp_path):
    out = tmp_path / "out"
    recipe = Recipe.uniform("w4g32", method="rtn")
    quantize_folder(prepare(str(model_folder(vocab_size=2048)), recipe), out)
    return out


@pytest.fixture
def verify(capsys):
    """A function that returns the exit code and the JSON of `llmq verify`."""

    def run(folder):
        capsys.readouterr()
        code = main(["verify", str(folder), "--json"])
        return code, json.loads(capsys.readouterr().out)

    return run


@pytest.mark.parametrize(
    "n_flips", [pytest.param(1, id="fast"), pytest.param(12, id="all", marks=pytest.mark.slow)]
)
def test_a_flipped_bit_is_named(checkpoint, verify, n_flips):
    """In every file, the manifest included."""
    generator = random.Random(0)
    assert verify(checkpoint)[0] == 0
    for path in sorted(checkpoint.iterdir()):
        whole = path.read_bytes()
        for _ in range(n_flips):
            damaged = bytearray(whole)
            damaged[generator.randrange(len(whole))] ^= 1 << generator.randrange(8)
            path.write_bytes(damaged)
            code, result = verify(checkpoint)
            if path.name in ("README.md", "report.html"):
                assert (code, result["edited"]) == (0, [path.name])
            else:
                assert code == 1, path.name
                assert path.name in result["error"]
            assert path.name == MANIFEST or result["files"] == len(os.listdir(checkpoint)) - 1
        path.write_bytes(whole)
    assert verify(checkpoint)[0] == 0


def test_what_is_missing_edited_and_added(checkpoint, verify, capsys):
    (checkpoint / "README.md").write_text("mine")
    (checkpoint / "notes").mkdir()
    (checkpoint / "notes" / "a.txt").touch()
    code, result = verify(checkpoint)
    assert (code, result["edited"], result["extra"]) == (0, ["README.md"], ["notes/a.txt"])
    assert main(["verify", str(checkpoint)]) == 0
    assert "not by llmq   notes/a.txt" in capsys.readouterr().out
    (checkpoint / "README.md").unlink()
    assert verify(checkpoint)[1]["absent"] == ["README.md"]
    for name in ("config.json", "tokenizer.json"):
        (checkpoint / name).unlink()
    code, result = verify(checkpoint)
    assert (code, result["missing"]) == (1, ["config.json", "tokenizer.json"])
    assert result["error"].endswith("config.json is missing; tokenizer.json is missing")


def test_a_manifest_of_an_earlier_version_has_no_hash_of_its_own(checkpoint, verify):
    data = json.loads((checkpoint / MANIFEST).read_text())
    (checkpoint / MANIFEST).write_text(json.dumps({"files": data["files"]}))
    assert verify(checkpoint)[0] == 0


@pytest.mark.parametrize(
    "name",
    ["../out/config.json", "/etc/passwd", "a/../config.json", "", ".", "a\nb", "./a", "a\\b"],
)
def test_a_manifest_that_names_what_is_not_in_the_folder(checkpoint, verify, name):
    (checkpoint / MANIFEST).write_text(
        json.dumps({"files": {name: {"sha256": "0" * 64, "bytes": 1}}})
    )
    code, result = verify(checkpoint)
    assert code == 2
    assert "expected plain names of files inside the folder" in result["error"]


DAMAGED = ["", "{}", "[]", '{"files": []}', '{"files": {"a": 1}}', "[" * 100_000]
DAMAGED += ['{"files": {"a": {"sha256": "0", "bytes": 1}}}', '{"files": {}, "sha256": 1}']


@pytest.mark.parametrize("content", DAMAGED, ids=range(len(DAMAGED)))
def test_a_damaged_manifest(checkpoint, verify, content):
    (checkpoint / MANIFEST).write_text(content)
    code, result = verify(checkpoint)
    assert code == 1
    assert f"{MANIFEST}: is damaged" in result["error"]


def test_special_files_do_not_stop_it(checkpoint, verify):
    (checkpoint / "config.json").unlink()
    os.mkfifo(checkpoint / "config.json")
    code, result = verify(checkpoint)
    assert (code, list(result["damaged"])) == (1, ["config.json"])


def test_a_circle_of_links_is_damage(checkpoint, verify):
    weights = next(checkpoint.glob("*.safetensors"))
    weights.unlink()
    weights.symlink_to(weights.name)
    code, result = verify(checkpoint)
    assert code == 1
    assert weights.name in result["error"]


def test_a_folder_that_is_not_of_llmq(model_folder, tmp_path, capsys):
    assert main(["verify", str(model_folder())]) == 2
    assert "nothing to check it against" in capsys.readouterr().err
    assert main(["verify", str(tmp_path / "nowhere")]) == 2


def flip_last_byte(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_load_checks_sizes_always_and_hashes_when_asked(checkpoint):
    shard = sorted(checkpoint.glob("*.safetensors"))[0]
    llmq.load(checkpoint, verify=True)
    flip_last_byte(shard)
    llmq.load(checkpoint)
    with pytest.raises(VerificationError, match=f"1 of .* files .*{shard.name} has sha256"):
        llmq.load(checkpoint, verify=True)
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(VerificationError, match=rf"{shard.name}: has \d+ bytes, expected \d+"):
        llmq.load(checkpoint)
    (checkpoint / MANIFEST).unlink()
    with pytest.raises(LlmqError, match="has no llmq-manifest"):
        llmq.load(checkpoint, verify=True)


def test_eval_and_compare_check_first(checkpoint, tmp_path, calibration_file, capsys, monkeypatch):
    options = ["--data", str(calibration_file), "--sequence-length", "32", "--max-windows", "1"]
    base = str(tmp_path / "model")
    seconds = itertools.count(0.0, 6.0)  # six from one look at the clock to the next
    monkeypatch.setattr(manifest.time, "monotonic", seconds.__next__)
    assert main(["eval", str(checkpoint), *options, "--json"]) == 0
    monkeypatch.undo()
    told = capsys.readouterr()
    assert json.loads(told.out)["verified"]["seconds"] == 6
    assert "files checked against their hashes in 6.0 s" in told.err
    assert main(["compare", base, str(checkpoint), *options, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["verified"]["base"] is None
    flip_last_byte(sorted(checkpoint.glob("*.safetensors"))[0])
    for command in (["eval", str(checkpoint)], ["compare", base, str(checkpoint)]):
        assert main([*command, *options]) == 1
        assert "not as llmq wrote them: model.safetensors" in capsys.readouterr().err
        assert main([*command, *options, "--no-verify"]) == 0
        capsys.readouterr()


def test_a_copy_without_the_records_of_the_run(checkpoint, verify, tmp_path):
    """Of a Hub id, only what the model needs is downloaded."""
    copy = tmp_path / "copy"
    shutil.copytree(checkpoint, copy, ignore=shutil.ignore_patterns("README.md"))
    assert verify(copy)[0] == 0
