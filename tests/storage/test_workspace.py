"""A resumed run uses nothing that it has not checked, follows no link and removes nothing that is
not its own."""

import hashlib
import json
import os
import shutil
import warnings
from pathlib import Path

import pytest

from llmq.errors import LlmqError, LlmqWarning
from llmq.ptq import streams as streams_module
from llmq.ptq.job import prepare
from llmq.ptq.run import quantize_folder
from llmq.recipe import Recipe
from llmq.storage import files, packing
from llmq.storage.partial_checkpoint import PartialCheckpoint

N_BLOCKS = 4


def digests(folder: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.glob("*.safetensors")
    }


def flip(path: Path) -> None:
    """One bit in the middle, at the same time of change."""
    content, status = bytearray(path.read_bytes()), path.stat()
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


class Lab:
    """A model, a recipe, what an undisturbed run gives, and runs stopped after some blocks."""

    def __init__(self, folder: Path, calibration: Path, tmp_path: Path, recipe: Recipe) -> None:
        self.folder, self.recipe = folder, recipe
        self.tokens = prepare(str(folder), recipe, calibration=str(calibration)).tokens
        self.tmp_path, self.out = tmp_path, tmp_path / "out"
        self.work_dir = tmp_path / ".out.llmq-partial"
        self.reference = tmp_path / "reference"
        self.solved: list[int] = []
        quantize_folder(self.job(), self.reference)

    def job(self):
        return prepare(str(self.folder), self.recipe, calibration=self.tokens)

    def stop_after(self, n_blocks: int) -> None:
        def stop(report):
            if report.index == n_blocks - 1:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            quantize_folder(self.job(), self.out, on_block=stop)

    def resume(self) -> tuple[dict, list[str]]:
        """The report, and what was told. The blocks that were solved are in `solved`."""
        self.solved = []
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", LlmqWarning)
            report = quantize_folder(
                self.job(), self.out, on_block=lambda block: self.solved.append(block.index)
            )
        return report, [str(each.message) for each in caught if each.category is LlmqWarning]


@pytest.fixture
def lab(model_folder, calibration_file, tmp_path, monkeypatch):
    def make(**options):
        monkeypatch.setattr(streams_module, "BATCH_BYTES", 40_000)  # more than one batch
        recipe = Recipe.uniform("w4g32", samples=6, sequence_length=32, **options)
        folder = model_folder(num_hidden_layers=N_BLOCKS, vocab_size=2048)
        return Lab(folder, calibration_file, tmp_path, recipe)

    return make


BLOCK = "blocks/0000{}.safetensors"
DAMAGES = {
    BLOCK.format(0): [0, 3],
    BLOCK.format(2): [2, 3],  # the inputs of block 3 are there
    "blocks/00001.json": [1, 3],
    "inputs-quantized-00003.bin": [3],
    "inputs-full-precision-00003.bin.seal": [3],
    "state.json": [0, 1, 2, 3],
}


@pytest.mark.parametrize(
    "options",
    [{}, pytest.param({"inputs": "full-precision"}, marks=pytest.mark.slow)],
    ids=["both", "exact"],
)
def test_a_flipped_bit_costs_the_block_it_is_in(lab, options):
    lab = lab(**options)
    lab.stop_after(3)
    kept = lab.tmp_path / "kept"
    shutil.copytree(lab.work_dir, kept)
    for name, solved in DAMAGES.items():
        shutil.rmtree(lab.work_dir, ignore_errors=True)
        shutil.copytree(kept, lab.work_dir)
        flip(lab.work_dir / name)
        report, told = lab.resume()
        assert digests(lab.out) == digests(lab.reference), name
        assert lab.solved == solved, name
        assert told, name
        assert report["redone_blocks"] == ([] if name == "state.json" else solved[:-1])
        assert [layer["name"] for layer in report["layers"]] == [
            layer["name"]
            for layer in json.loads((lab.reference / "report.json").read_text())["layers"]
        ]
        shutil.rmtree(lab.out)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt2", "gemma3_text", "falcon"])
def test_inputs_are_computed_again_to_the_same_bits_in_every_family(
    family, model_folder, calibration_file, tmp_path
):
    recipe = Recipe.uniform("w4g32", samples=6, sequence_length=32)
    lab = Lab(model_folder(family), calibration_file, tmp_path, recipe)
    lab.stop_after(1)
    flip(lab.work_dir / "inputs-quantized-00001.bin")
    lab.resume()
    assert digests(lab.out) == digests(lab.reference)
    assert lab.solved == [1]


def test_two_damaged_blocks_and_no_inputs(lab):
    lab = lab()
    lab.stop_after(3)
    for index in (0, 2):
        (lab.work_dir / BLOCK.format(index)).unlink()
    for path in lab.work_dir.glob("inputs-*.bin"):
        path.unlink()
    _, told = lab.resume()
    assert lab.solved == [0, 2, 3]
    assert digests(lab.out) == digests(lab.reference)
    assert not any("does not give" in line for line in told)


def test_without_calibration_text_blocks_are_on_their_own(model_folder, calibration_file, tmp_path):
    recipe = Recipe.uniform("w4g32", method="rtn")
    folder = model_folder(num_hidden_layers=N_BLOCKS)
    lab = Lab(folder, calibration_file, tmp_path, recipe)
    lab.stop_after(3)
    flip(lab.work_dir / BLOCK.format(0))
    lab.resume()
    assert lab.solved == [0, 3]
    assert digests(lab.out) == digests(lab.reference)


def test_a_block_that_comes_out_otherwise_takes_the_later_ones_along(lab, monkeypatch):
    lab = lab()
    lab.stop_after(3)
    flip(lab.work_dir / BLOCK.format(1))
    flip(lab.work_dir / "inputs-quantized-00002.bin.seal")
    _, told = lab.resume()
    assert lab.solved == [1, 2, 3]
    assert any("the finished blocks behind it are done again" in line for line in told)
    assert digests(lab.out) == digests(lab.reference)


def test_a_block_that_changes_after_it_was_verified_is_not_published(lab, monkeypatch):
    lab = lab()
    keep, kept = PartialCheckpoint.keep_only_blocks, []

    def damage(self):
        keep(self)
        kept.append(flip(self.block_path(1)))

    with monkeypatch.context() as patch:
        patch.setattr(PartialCheckpoint, "keep_only_blocks", damage)
        with pytest.raises(LlmqError, match=r"00001\.safetensors: changed after it was"):
            lab.resume()
    assert not lab.out.exists()
    lab.resume()
    assert lab.solved == [1]
    assert digests(lab.out) == digests(lab.reference)


def test_damage_to_a_shard_costs_the_block_it_is_in(lab, monkeypatch):
    """Blocks are read from shards once these are written, and go as soon as that is so."""
    monkeypatch.setattr(packing, "MAX_SHARD_BYTES", 70_000)
    lab = lab()
    assert [path.name for path in sorted(lab.reference.glob("*.safetensors"))] == [
        f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)
    ]
    n_left = []

    def stop(self):
        n_left.append(len(list(self.blocks_dir.glob("*.safetensors"))))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(PartialCheckpoint, "publish", stop)
        with pytest.raises(KeyboardInterrupt):
            quantize_folder(lab.job(), lab.out)
    assert n_left == [0]
    kept = lab.tmp_path / "kept"
    shutil.copytree(lab.work_dir, kept)
    first = "checkpoint/model-00001-of-00003.safetensors"
    tensors = packing.stored_tensors(kept / first)
    starts = {name: tensor.start for name, tensor in tensors.items()}
    damages = {
        (first, min(starts[name] for name in starts if ".layers.1." in name)): [1],
        (first, 20): [0, 1],  # the header tells of all blocks in it
        (first, None): [0, 1],
        ("blocks/model-00001-of-00003.safetensors.json", 40): [],
        ("blocks/00002.json", 40): [2],
    }
    for (name, place), solved in damages.items():
        shutil.rmtree(lab.work_dir, ignore_errors=True)
        shutil.copytree(kept, lab.work_dir)
        if place is None:
            (lab.work_dir / name).unlink()
        else:
            content = bytearray((lab.work_dir / name).read_bytes())
            content[place] ^= 4
            (lab.work_dir / name).write_bytes(content)
        report, told = lab.resume()
        assert lab.solved == solved, (name, place)
        assert told, (name, place)
        assert report["redone_blocks"] == solved, (name, place)
        assert digests(lab.out) == digests(lab.reference), (name, place)
        shutil.rmtree(lab.out)


def victim_of(tmp_path: Path) -> Path:
    victim = tmp_path / "victim"
    victim.mkdir()
    for name in ("a.tmp", "state.json", "model-00001-of-00005.safetensors"):
        (victim / name).write_text("precious")
    return victim


def is_untouched(victim: Path) -> bool:
    return {path.read_text() for path in victim.iterdir()} == {"precious"} and len(
        list(victim.iterdir())
    ) == 3


# What is planted together, and what it would lead to.
LINKS = [
    {"checkpoint": "."},
    {"blocks": ".", "lock": "a.tmp"},
    {"state.json": "state.json"},
    {
        BLOCK.format(0): "model-00001-of-00005.safetensors",
        "blocks/00002.tmp": "a.tmp",
        "checkpoint/model.safetensors": "model-00001-of-00005.safetensors",
        "checkpoint/config.json.tmp": "a.tmp",
        "checkpoint/README.md": "a.tmp",
        "inputs-quantized-00003.tmp": "a.tmp",
        "inputs-quantized-00004.tmp": "a.tmp",
    },
]


@pytest.mark.parametrize("kind", ["symbolic", "hard"])
def test_links_in_a_work_folder_are_not_followed(lab, tmp_path, kind):
    lab, victim = lab(), victim_of(tmp_path)
    lab.stop_after(2)
    kept = tmp_path / "kept"
    shutil.copytree(lab.work_dir, kept)
    for links in LINKS:
        if kind == "hard" and "." in links.values():
            continue
        shutil.rmtree(lab.work_dir, ignore_errors=True)
        shutil.copytree(kept, lab.work_dir)
        for name, target in links.items():
            files.remove(lab.work_dir / name)
            if kind == "hard":
                os.link(victim / target, lab.work_dir / name)
            else:
                (lab.work_dir / name).symlink_to(victim / target)
        _, told = lab.resume()
        assert is_untouched(victim), links
        assert digests(lab.out) == digests(lab.reference), links
        assert kind == "hard" or any("not followed" in line for line in told), links
        assert not any(path.is_symlink() for path in lab.out.rglob("*"))
        shutil.rmtree(lab.out)


def test_what_llmq_did_not_make_is_left_alone(lab, tmp_path):
    lab, victim = lab(), victim_of(tmp_path)
    victim.rename(lab.work_dir)
    (lab.work_dir / "state.json").rename(lab.work_dir / "other.json")
    with pytest.raises(LlmqError, match=r"was not made by it .*has neither"):
        lab.resume()
    assert is_untouched(lab.work_dir)
    lab.work_dir.rename(victim)
    lab.work_dir.symlink_to(victim)
    with pytest.raises(LlmqError, match="no folder, or a link to one"):
        lab.resume()
    assert is_untouched(victim)


def test_an_output_of_that_name_that_was_moved_aside_by_somebody_else(lab, tmp_path):
    lab = lab()
    quantize_folder(lab.job(), lab.out)
    aside = files.aside_of(lab.out)
    victim_of(tmp_path).rename(aside)
    with pytest.raises(LlmqError, match=r"\.out\.replaced: is in the way and was not made by llmq"):
        quantize_folder(lab.job(), lab.out, overwrite=True)
    with pytest.raises(LlmqError, match="exists already"):
        quantize_folder(lab.job(), lab.out)
    assert is_untouched(aside)
    assert digests(lab.out) == digests(lab.reference)
    shutil.rmtree(aside)
    (lab.out / "mine.txt").touch()
    quantize_folder(lab.job(), lab.out, overwrite=True)
    assert not (lab.out / "mine.txt").exists()
    assert not list(tmp_path.glob(".out*"))


def test_state_that_cannot_be_read_heals_by_starting_over_with_a_line(lab):
    lab = lab()
    for content in (b"{", b'{"content": {}, "sha256": 0}'):
        lab.stop_after(1)
        (lab.work_dir / "state.json").write_bytes(content)
        _, told = lab.resume()
        assert lab.solved == list(range(N_BLOCKS))
        assert any("starting over" in line for line in told)
        shutil.rmtree(lab.out)
