"""Pictures of rows: where they may lie, where they stand in the text, and what is refused."""

import json
from random import Random

import datasets
import numpy as np
import pandas
import pytest
from picture_models import picture

from llmq.errors import LlmqError, LlmqWarning
from llmq.text import pictures
from llmq.text.address import Address
from llmq.text.documents import read_text
from llmq.text.hub import open_rows
from llmq.text.illustrated import IMAGE
from llmq.text.rows import Documents


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def illustrated(source):
    return read_text(str(source), "calibration", with_pictures=True).illustrated


def pixels(source):
    """Of all pictures, by row."""
    return [
        [np.asarray(each.open()).tolist() for each in row.pictures] for row in illustrated(source)
    ]


def test_pictures_are_the_same_wherever_they_lie(tmp_path):
    images = [picture(0), picture(1)]
    (tmp_path / "p").mkdir()
    for index, image in enumerate(images):
        image.save(tmp_path / "p" / f"{index}.png")
    paths = [f"p/{index}.png" for index in range(2)]
    encoded = [(tmp_path / path).read_bytes() for path in paths]
    write(tmp_path / "rows.jsonl", {"text": "a", "images": paths}, {"text": "b", "images": []})
    structs = [{"bytes": data, "path": None} for data in encoded]
    pandas.DataFrame({"text": ["a"], "images": [structs]}).to_parquet(tmp_path / "rows.parquet")
    features = datasets.Features(
        {"text": datasets.Value("string"), "images": datasets.List(datasets.Image())}
    )
    rows = datasets.Dataset.from_list([{"text": "a", "images": images}], features=features)
    rows.save_to_disk(tmp_path / "saved")
    expected = [[np.asarray(image).tolist() for image in images]]
    for name in ("rows.jsonl", "rows.parquet", "saved"):
        assert pixels(tmp_path / name) == expected, name
    in_memory = Documents(with_pictures=True)
    in_memory.add([{"text": "a", "image": images[0]}], "rows")
    assert np.array_equal(in_memory.illustrated[0].pictures[0].open(), images[0])


def test_pictures_of_the_hub_are_taken_as_they_are_stored(tmp_path):
    features = datasets.Features({"text": datasets.Value("string"), "image": datasets.Image()})
    rows = datasets.Dataset.from_list([{"text": "a", "image": picture(3)}], features=features)
    rows.to_parquet(tmp_path / "rows.parquet")
    found = open_rows(Address("parquet"), "train", str(tmp_path / "rows.parquet"))
    collected = Documents(with_pictures=True)
    collected.add(found.rows, "someone/pictures")
    (row,) = collected.illustrated
    assert isinstance(row.pictures[0].content, bytes)
    assert np.array_equal(row.pictures[0].open(), picture(3))


def kinds(row):
    return [part.get("text", "*") for turn in row.turns for part in turn["content"]]


def test_places_of_pictures(tmp_path):
    picture(0).save(tmp_path / "a.png")
    image, two = {"image": "a.png"}, {"images": ["a.png", "a.png"]}
    parts = [{"type": "text", "text": "x"}, IMAGE, {"type": "text", "text": "y"}]
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "That."}]
    source = write(
        tmp_path / "rows.jsonl",
        {"messages": [{"role": "user", "content": parts}], **image},
        {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "x"}], **two},
        {"messages": turns, **image},
        {"messages": turns, **two},
        {"messages": [{"role": "user", "content": "no picture"}]},
    )
    text = read_text(str(source), "calibration", with_pictures=True)
    assert [kinds(row) for row in text.illustrated] == [
        ["x", "*", "y"],
        ["s", "*", "*", "x"],
        ["*", "What?", "That."],
    ]
    assert text.read["pictures_left_out"] == {"places for another number of pictures": 1}
    assert len(text.documents) == 5
    assert "<image>" not in "".join(text.documents)


def test_pictures_beside_a_model_of_text_are_counted(tmp_path, recwarn):
    rows = write(tmp_path / "rows.jsonl", {"text": "a <image> b", "images": ["gone.png"] * 3})
    with pytest.warns(LlmqWarning, match="3 pictures are left aside, and the text beside them"):
        text = read_text(str(rows), "calibration")
    assert text.documents == ["a  b"]
    assert text.read["pictures_in_rows"] == 3
    recwarn.clear()
    assert not read_text(f"{rows}#text", "calibration", with_pictures=True).illustrated
    assert not recwarn.list


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("gone.png", r"row 0: .*gone\.png: no picture that can be opened"),
        ("text.png", r"row 0: .*text\.png: no picture that can be opened"),
        ("program.eps", r"row 0: .*program\.eps: no picture that can be opened"),
        ("large.png", r"row 0: .*large\.png: 40 x 30 pixels, more than the 1000"),
        ("https://x.org/a.png", "a picture that is not here; store it in a file"),
        (7, "expected a picture, got int; give the path of a file"),
    ],
)
def test_what_is_no_picture_is_refused(value, message, tmp_path, monkeypatch):
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "program.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    picture(0).save(tmp_path / "large.png")
    monkeypatch.setattr(pictures, "MAX_PIXELS", 1000)
    rows = write(tmp_path / "rows.jsonl", {"text": "a", "image": value})
    with pytest.raises(LlmqError, match=message):
        illustrated(rows)[0].pictures[0].open()


ODD_PICTURES: list[object] = [
    *("a.png", "empty.png", "half.png", "empty.gif", "folder", "", "a\0b.png", "a" * 5000),
    *("data:image/png;base64,!!!", None, 0, 1.5, True, float("nan"), [], {}, [{}], [None]),
    *([["a.png"]], ["a.png", None], {"path": 3}, {"bytes": [1, 2]}, {"bytes": None, "path": None}),
]
ODD_CONTENTS: list[object] = [
    *("x", "<image>", "<image> <image>", "", None, 3, [], [3], {"a": 1}, [IMAGE]),
    *([{"type": ["image"]}], [{"type": "text", "text": None}], [{"type": "image_url"}]),
]


def odd_row(random):
    row = {random.choice(["images", "image"]): random.choice(ODD_PICTURES)}
    if random.random() < 0.5:
        return {**row, "text": random.choice(ODD_CONTENTS)}
    roles = ["user", "assistant", "", None, 5]
    turns = [
        {"role": random.choice(roles), "content": random.choice(ODD_CONTENTS)}
        for _ in range(random.choice([0, 1, 2]))
    ]
    return {**row, "messages": turns if random.random() < 0.9 else random.choice(ODD_CONTENTS)}


@pytest.mark.filterwarnings("ignore::llmq.errors.LlmqWarning")
@pytest.mark.parametrize("n_files", [200, pytest.param(5000, marks=pytest.mark.slow)])
def test_odd_rows_are_read_or_refused_in_one_line(n_files, tmp_path):
    picture(0).save(tmp_path / "a.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "a.png").read_bytes()[:40])
    (tmp_path / "empty.png").touch()
    (tmp_path / "empty.gif").write_bytes(b"GIF89a" + bytes(7))  # of 0 x 0 pixels
    (tmp_path / "folder").mkdir()
    n_read, refused, random = 0, list[str](), Random(0)
    for _ in range(n_files):
        source = write(tmp_path / "rows.jsonl", odd_row(random))
        try:
            for row in illustrated(source):
                for each in row.pictures:
                    each.open()
                    n_read += 1
        except LlmqError as error:
            refused.append(str(error))
    assert n_read
    assert refused
    assert [message for message in refused if "\n" in message] == []


def test_without_pillow_it_is_said_what_to_install(monkeypatch):
    monkeypatch.setattr(pictures, "find_spec", lambda name: None)
    with pytest.raises(LlmqError, match=r"take Pillow to open: pip install pillow"):
        pictures.check_pillow("rows.jsonl")
