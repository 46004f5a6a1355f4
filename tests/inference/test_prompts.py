"""Prompts are read as they stand in files, folders and datasets, or everything wrong with them is told."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageOps

from polymerge.errors import MissingExtraError, PolymergeError, RecipeError, Refused
from polymerge.inference.images import StoredImage, open_image
from polymerge.inference.prompts import Prompt, check_images, materialise, read_prompts

datasets: Any = pytest.importorskip("datasets")


@pytest.fixture(autouse=True)
def own_datasets_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` may have been imported before the cache folder of the tests was set."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets_cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def picture(path: Path, level: int = 0) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 3), (level, 10, 20)).save(path)
    return str(path)


def written(path: Path, *lines: object) -> Path:
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    path.write_text(text + "\n", encoding="utf-8")
    return path


def problems(source: object, **options: Any) -> list[str]:
    """What is wrong, each without the name of the file."""
    with pytest.raises(PolymergeError) as raised:
        read_prompts(source, **options)  # type: ignore[arg-type]
    error = raised.value
    found = error.problems if isinstance(error, Refused) else (error,)
    assert all(isinstance(problem, RecipeError) for problem in found)
    return [str(problem).removeprefix(f"{source}: ") for problem in found]


# --- prompt files


def test_json_lines(tmp_path: Path) -> None:
    one, two = picture(tmp_path / "in" / "one.png"), picture(tmp_path / "two.jpg")
    file = written(
        tmp_path / "prompts.jsonl",
        {"text": " What? ", "image": "in/one.png", "answer": ["a", "b"]},
        "",
        {"question": "a\u2028b", "images": [two, "in/../two.jpg"], "metadata": {"x": 1}, "category": "y"},
        {"prompt": "No image", "image": None, "id": 7, "answers": {"yes": 3}},
    )
    assert read_prompts(file) == [
        Prompt(0, " What? ", (one,), ["a", "b"]),
        Prompt(2, "a\u2028b", (two, two)),
        Prompt(7, "No image", (), {"yes": 3}),
    ]
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes().replace(b"\n", b"\r\n"))
    assert len(read_prompts(str(file))) == 3


def test_image_paths_are_absolute_wherever_the_file_is_read_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside, outside = picture(tmp_path / "a" / "x.png"), picture(tmp_path / "b" / "x.png")
    written(tmp_path / "a" / "p.jsonl", {"text": "?", "image": "x.png"}, {"text": "?", "image": "../b/x.png"})
    monkeypatch.chdir(tmp_path)
    assert [prompt.images for prompt in read_prompts("a/p.jsonl")] == [(inside,), (outside,)]
    assert [prompt.images for prompt in read_prompts("a/p.jsonl", image_folder="b")] == [(outside,), (outside,)]


@pytest.mark.parametrize("listed", [False, True])
def test_the_llava_question_format(tmp_path: Path, listed: bool) -> None:
    path = picture(tmp_path / "images" / "1.png")
    records = [
        {"question_id": "q1", "image": "1.png", "text": "Is it?\nYes or no.", "category": "default"},
        {"question_id": "q2", "image": "1.png", "text": "And?", "category": "default", "answer": "no"},
    ]
    file = written(tmp_path / "q.json", json.dumps(records, indent=1)) if listed else written(tmp_path / "q", *records)
    expected = [Prompt("q1", "Is it?\nYes or no.", (path,)), Prompt("q2", "And?", (path,), "no")]
    assert read_prompts(file, image_folder=tmp_path / "images") == expected


def test_conversations(tmp_path: Path) -> None:
    path = picture(tmp_path / "1.png")
    turns = [("system", "Be kind."), ("human", "<image>\nWho?"), ("gpt", "Ann"), ("human", "Why?"), ("gpt", "So.")]
    said = [{"from": who, "value": what} for who, what in turns]
    records = [
        {"id": "a", "image": "1.png", "conversations": said},
        {"id": "b", "image": ["1.png", "1.png"], "conversations": [{"from": "user", "value": "<image> <image>\nTwo?"}]},
    ]
    file = written(tmp_path / "c.json", json.dumps(records))
    assert read_prompts(file) == [Prompt("a", "Who?", (path,), "Ann"), Prompt("b", "Two?", (path, path))]


def test_image_marks_are_taken_out_and_counted(tmp_path: Path) -> None:
    picture(tmp_path / "1.png")
    texts = ["<image>\nWho?", "Who?\n<image>", "Who is <image> this?", "one\n<image>\ntwo"]
    file = written(tmp_path / "p.jsonl", *({"text": text, "image": "1.png"} for text in texts))
    assert [p.text for p in read_prompts(file)] == ["Who?", "Who?", "Who is this?", "one\ntwo"]
    written(file, {"text": "<image> Who?"}, {"text": "<image><image> Who?", "image": "1.png"}, {"text": "<image>"})
    assert problems(file) == [
        "line 1: text has 1 <image> mark(s), and the record 0 image(s)",
        "line 2: text has 2 <image> mark(s), and the record 1 image(s)",
        "line 3: text has 1 <image> mark(s), and the record 0 image(s)",
        "line 3: text is empty",
    ]


def test_fields_with_other_names(tmp_path: Path) -> None:
    file = written(tmp_path / "p.jsonl", {"query": "A?", "question": "B?", "key": 5, "id": 6, "label": "c"})
    names = {"text": "query", "id": "key", "answer": "label"}
    assert read_prompts(file, fields=names) == [Prompt(5, "A?", (), "c")]
    assert problems(file, fields={"txt": "query", "id": ""}) == [
        "fields: 'txt' is none of a prompt. Did you mean 'text'?",
        "fields: id: '' is not the name of a field",
    ]
    both = written(tmp_path / "both.jsonl", {"text": "A?", "conversations": [], "image": "gone", "images": []})
    assert read_prompts(both, fields={"text": "text", "images": "images"}) == [Prompt(0, "A?")]


def test_everything_wrong_is_told_at_once_with_its_line(tmp_path: Path) -> None:
    picture(tmp_path / "1.png")
    file = written(
        tmp_path / "p.jsonl",
        {"text": "fine", "image": "1.png"},
        {"txt": "?", "image": "1.png"},
        {"text": "?", "imags": "1.png"},
        {"text": "?", "image": "gone.png"},
        {"text": "?", "images": ["1.png", "", 5]},
        {"text": "?", "images": "1.png"},
        {"text": "?", "image": "1.png", "images": ["1.png"]},
        {"text": "?", "question": "?"},
        {"text": " \n"},
        {"text": 5},
        {"text": None},
        {"text": "?", "id": True},
        {"text": "?", "id": 1.5},
        {"text": "?", "id": 0},
        ["text"],
        '{"text": "?"',
        '{"text": "?", "text": "!"}',
        '{"text": "?", "answer": NaN}',
        '{"text": "?", "answer": 1e999}',
        '{"text": "\\ud800"}',
        {"text": "?", "conversations": []},
        {"conversations": []},
        {"conversations": {"from": "human"}},
        {"text": "?", "image": "a\0b"},
        {"text": "?", "image": "x" * 300},
    )
    found = problems(file)
    expected = [
        ("2", "'txt' is no field of a prompt. Did you mean 'text'?"),
        ("2", "has no text: none of the fields text, question, prompt, conversations is there"),
        ("3", "'imags' is no field of a prompt. Did you mean 'images'?"),
        ("4", f"image: there is no file '{tmp_path}/gone.png'"),
        ("5", "image: '' is not a path"),
        ("5", "image: 5 is not a path"),
        ("6", "images: '1.png' is not a list of paths"),
        ("7", "has both image and images. Say one of them."),
        ("8", "has both text and question. Say which is the text with fields."),
        ("9", "text is empty"),
        ("10", "text: 5 is not a text"),
        ("11", "text: None is not a text"),
        ("12", "id: True is neither a whole number nor a text"),
        ("13", "id: 1.5 is neither a whole number nor a text"),
        ("15", "['text'] is not an object with fields"),
        ("16", "is not JSON: Expecting ',' delimiter at column 13. Correct it."),
        ("17", "cannot be read: 'text' appears twice in one object. Correct it."),
        ("18", "holds NaN, infinity or a number too large, which JSON has not. Correct it."),
        ("19", "holds NaN, infinity or a number too large, which JSON has not. Correct it."),
        ("20", "holds half of a surrogate pair, which is no character. Correct it."),
        ("21", "has a text and conversations, which have one, too. Say one of them."),
        ("21", "conversations has no turn from human or user"),
        ("22", "conversations has no turn from human or user"),
        ("23", 'conversations is not a list of {"from": "...", "value": "..."}'),
        ("24", f"image: there is no file '{tmp_path}/a\\x00b'"),
        ("25", f"image: there is no file '{tmp_path}/{'x' * 300}'"),
    ]
    last = f"id 0 is also that of {file}: line 1"
    assert found == [*(f"line {line}: {said}" for line, said in expected), f"line 14: {last}"]


def test_a_broken_list_names_the_line(tmp_path: Path) -> None:
    file = written(tmp_path / "p.json", '[{"text": "a"},\n {"text": "b"}\n {"text": "c"}]')
    assert problems(file) == ["is not JSON: Expecting ',' delimiter at line 3, column 2. Correct it."]
    written(file, '[{"text": "a"},\n {"text": ""}, 5]')
    assert problems(file) == ["[1]: text is empty", "[2]: 5 is not an object with fields"]
    file.write_bytes(b'[{"text": "a"},\n {"text": "\xe9"}]')
    assert problems(file) == [f"{file}:2: is not UTF-8: byte 27 is 0xe9. Correct it."]


@pytest.mark.parametrize("text", ["", "\n\n", "[]"])
def test_no_prompts_at_all(tmp_path: Path, text: str) -> None:
    (tmp_path / "p.jsonl").write_text(text)
    assert problems(tmp_path / "p.jsonl") == ["an empty list: there is no prompt in it"]


def test_ids_are_numbers_or_texts(tmp_path: Path) -> None:
    file = written(tmp_path / "p.jsonl", {"text": "a", "id": "1"}, {"text": "b"}, {"text": "c", "id": "1"})
    assert problems(file) == [f"line 3: id '1' is also that of {file}: line 1"]
    written(file, {"text": "a", "id": "1"}, {"text": "b"})
    assert read_prompts(file) == [Prompt("1", "a"), Prompt(1, "b")]


def test_a_thousand_problems_are_counted(tmp_path: Path) -> None:
    file = written(tmp_path / "p.jsonl", *({"text": "?", "image": f"{n}.png"} for n in range(1000)))
    found = problems(file)
    assert len(found) == 51
    assert found[-1] == "950 more such problems"


def test_options_that_say_nothing_are_refused(tmp_path: Path) -> None:
    file = written(tmp_path / "p.jsonl", {"text": "?"})
    assert problems(file, question="?", split="train") == [
        f"question: {file} is a prompt file, for which it says nothing. Leave it out.",
        f"split: {file} is a prompt file, for which it says nothing. Leave it out.",
    ]
    assert problems(file, image_folder=tmp_path / "x") == [f"image_folder: there is no folder '{tmp_path / 'x'}'"]
    assert "there is no such file or folder, and it is no hub id" in problems(tmp_path / "gone")[0]


# --- a folder of images


def test_a_folder_of_images(tmp_path: Path) -> None:
    names = ("b.PNG", "a.jpeg", "c.webp", "d.bmp", "e.gif", "f.jpg", ".hidden.png")
    paths = {name: picture(tmp_path / name) for name in names}
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "sub.png").mkdir()
    found = read_prompts(tmp_path, question="What?")
    assert found == [Prompt(name, "What?", (paths[name],)) for name in sorted(names[:-1])]
    check_images(found)
    assert problems(tmp_path) == ["a folder of images needs a question to ask about each. Say it with question."]
    assert problems(tmp_path / "sub.png", question="?")[0].startswith("an empty list: no .png, ")


# --- datasets


def two_colours() -> Any:
    """Three rows, the second of two images; the third has none."""
    images = [[Image.new("RGB", (5, 4), "red")], [Image.new("L", (3, 3), n) for n in (9, 200)], []]
    table = {"question": ["One?", "<image><image> Two?", "None?"], "images": images, "answer": ["a", "b", None]}
    features = {
        "question": datasets.Value("string"),
        "images": datasets.List(datasets.Image()),
        "answer": datasets.Value("string"),
    }
    return datasets.Dataset.from_dict(table, features=datasets.Features(features))


def saved(data: Any, tmp_path: Path, how: str) -> Path:
    folder = tmp_path / how
    if how == "disk":
        data.save_to_disk(str(folder))
        return folder
    folder.mkdir()
    data.to_parquet(str(folder / "data.parquet"))
    return folder if how == "folder" else folder / "data.parquet"


@pytest.mark.parametrize("how", ["disk", "folder", "file"])
def test_a_dataset_and_its_images(tmp_path: Path, how: str) -> None:
    source = saved(two_colours(), tmp_path, how)
    prompts = read_prompts(source)
    assert [(p.id, p.text, len(p.images), p.answer) for p in prompts] == [
        (0, "One?", 1, "a"), (1, "Two?", 2, "b"), (2, "None?", 0, None)
    ]  # fmt: skip
    assert all(isinstance(image, StoredImage) for p in prompts for image in p.images)
    check_images(prompts)
    out = tmp_path / "out"
    drawn = materialise(prompts[1:], out)
    assert len(list(out.iterdir())) == 2  # only those drawn
    assert [Image.open(path).getpixel((0, 0)) for path in drawn[0].images] == [(9, 9, 9), (200, 200, 200)]
    assert materialise(prompts[1:], out) == drawn == materialise(drawn, tmp_path / "unused")
    assert not (tmp_path / "unused").exists()
    assert materialise(prompts[:1], out)[0].text == "One?"
    for before, after in zip(prompts[1].images, drawn[0].images, strict=True):
        assert open_image(before).tobytes() == open_image(after).tobytes()


def test_a_dataset_of_single_images_paths_and_other_names(tmp_path: Path) -> None:
    path = picture(tmp_path / "disk" / "x.png")
    table = {
        "query": ["A?", "B?", "C?"],
        "photo": [Image.new("RGB", (2, 2), "blue"), None, Image.new("RGB", (2, 2), "red")],
        "key": ["k1", "k2", "k3"],
        "unread": [1, 2, 3],
    }
    rows = datasets.Dataset.from_dict(table).cast_column("photo", datasets.Image())
    source = saved(rows, tmp_path, "folder")
    names = {"text": "query", "image": "photo", "id": "key"}
    prompts = read_prompts(source, fields=names, split="train")
    assert [(p.id, len(p.images)) for p in prompts] == [("k1", 1), ("k2", 0), ("k3", 1)]
    assert str(prompts[2].images[0]) == f"{source}: row 2, photo[0]"
    assert [open_image(p.images[0]).getpixel((0, 0)) for p in prompts[::2]] == [(0, 0, 255), (255, 0, 0)]
    told = datasets.Dataset.from_dict({"text": ["?"], "image": ["x.png"]})
    assert read_prompts(saved(told, tmp_path, "disk"))[0].images == (path,)


def test_a_dataset_of_shuffled_rows_has_the_images_of_its_rows(tmp_path: Path) -> None:
    images = [Image.new("RGB", (2, 2), (n, 0, 0)) for n in range(20)]
    rows = datasets.Dataset.from_dict({"text": [f"{n}?" for n in range(20)], "image": images})
    source = saved(rows.cast_column("image", datasets.Image()).shuffle(seed=1).select(range(5, 15)), tmp_path, "disk")
    prompts = read_prompts(source)
    assert [f"{open_image(p.images[0]).getpixel((0, 0))[0]}?" for p in prompts] == [p.text for p in prompts]
    assert len({p.text for p in prompts}) == 10


def test_splits_of_a_dataset(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_dict({"text": ["?"]})
    both = datasets.DatasetDict(train=rows, test=datasets.Dataset.from_dict({"text": ["!"]}))
    both.save_to_disk(str(tmp_path / "both"))
    assert read_prompts(tmp_path / "both", split="test") == [Prompt(0, "!")]
    assert problems(tmp_path / "both") == ["no split is named. Say split: train, test."]
    assert problems(tmp_path / "both", split="tst") == ["it has no split 'tst'. Did you mean 'test'?"]
    source = saved(rows, tmp_path, "disk")
    assert problems(source, split="train") == ["split: 'train' cannot be chosen, it was saved as one. Leave it out."]
    assert "the dataset cannot be loaded: ValueError: Unknown split" in problems(
        saved(rows, tmp_path, "folder"), split="val"
    )[0]  # fmt: skip


def test_a_dataset_of_the_hub_is_asked_for_by_its_id_and_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def load_dataset(*names: str, **options: object) -> Any:
        seen.append((names, options))
        return two_colours()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    prompts = read_prompts("someone/some.thing@v1.0", split="test[:3]")
    assert seen == [(("someone/some.thing",), {"revision": "v1.0", "split": "test[:3]"})]
    assert str(prompts[0].images[0]) == "someone/some.thing@v1.0: row 0, images[0]"
    rows = datasets.Dataset.from_dict({"text": ["?"], "image": ["x.png"]})
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: rows)
    assert problems("someone/thing") == ["row 0: image: 'x.png' is relative to nothing. Say image_folder."]


def test_what_is_wrong_with_a_dataset(tmp_path: Path) -> None:
    table = {"txt": ["a", "", "c"], "question": ["a", None, " "], "prompt": ["a", "b", "c"], "image": [1, 2, 3]}
    source = saved(datasets.Dataset.from_dict(table), tmp_path, "disk")
    assert problems(source) == ["has columns question and prompt. Say which is the text with fields."]
    assert problems(source, fields={"text": "tx", "id": "idd"}) == [
        "fields: id: no column 'idd'. Known: image, prompt, question, txt.",
        "fields: text: no column 'tx'. Did you mean 'txt'?",
    ]
    assert problems(source, fields={"text": "prompt"}) == ["column image holds int64, and not images or paths"]
    assert problems(source, fields={"text": "question", "images": "txt"}) == [
        f"row 0: image: there is no file '{source}/a'",
        "row 1: text: None is not a text",
        "row 1: image: '' is not a path",
        f"row 2: image: there is no file '{source}/c'",
        "row 2: text is empty",
    ]
    no_text = saved(datasets.Dataset.from_dict({"label": [1]}), tmp_path, "file")
    assert problems(no_text) == [
        "no column text, question, prompt or conversations; there are label. Say which holds the text with fields."
    ]
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 no table PAR1")
    assert problems(tmp_path / "broken.parquet")[0].startswith("the dataset cannot be loaded: ")


def test_a_name_beside_what_is_there_is_not_looked_up_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path)
    assert "there is no such file or folder" in problems("data/prompts.jsonl")[0]
    assert problems("nobody/nothing@main", split="test")[0].startswith("the dataset cannot be loaded: ")


def test_without_datasets_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = saved(two_colours(), tmp_path, "file")
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'polymerge\[datasets\]'"):
        read_prompts(source)


# --- images


def test_all_broken_images_are_told_at_once(tmp_path: Path) -> None:
    good = picture(tmp_path / "good.png")
    (tmp_path / "text.png").write_text("no image")
    data = bytearray(Path(good).read_bytes())
    data[40] ^= 1
    (tmp_path / "flipped.png").write_bytes(data)
    broken = [str(tmp_path / name) for name in ("gone.png", "text.png", "flipped.png")]
    prompts = [Prompt(1, "?", (good,)), Prompt(2, "?", (broken[0], good)), Prompt("3", "?", tuple(broken))]
    with pytest.raises(Refused) as refused:
        check_images(prompts)
    said = [str(problem) for problem in refused.value.problems]
    assert [problem.split(": no image that can be read")[0] for problem in said] == [
        f"prompt 2: {broken[0]}", f"prompt '3': {broken[1]}", f"prompt '3': {broken[2]}"
    ]  # fmt: skip
    check_images(prompts[:1])


def test_rows_whose_image_is_broken_are_told_at_once(tmp_path: Path) -> None:
    cells = [{"bytes": data, "path": None} for data in (b"no", b"image")]
    rows = datasets.Dataset.from_dict({"text": ["?", "!"], "image": cells})
    prompts = read_prompts(saved(rows, tmp_path, "file"))
    for check in (check_images, lambda drawn: materialise(drawn, tmp_path / "out")):
        with pytest.raises(Refused, match=r"prompt 0: .*row 0, image\[0\]: no image[^\n]*\n.*prompt 1: .*row 1"):
            check(prompts)


def test_images_are_opened_as_they_are_seen(tmp_path: Path) -> None:
    photo = Image.new("RGB", (2, 1), "red")
    photo.putpixel((0, 0), (0, 0, 255))
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    photo.save(tmp_path / "photo.png", exif=exif)
    seen = open_image(str(tmp_path / "photo.png"))
    assert (seen.mode, seen.size, seen.getpixel((0, 0))) == ("RGB", (1, 2), (0, 0, 255))
    assert seen.tobytes() == ImageOps.exif_transpose(Image.open(tmp_path / "photo.png")).tobytes()
    palette = Image.new("P", (2, 2))
    palette.putpalette([7, 8, 9])
    palette.save(tmp_path / "palette.png", transparency=b"\x80")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert open_image(str(tmp_path / "palette.png")).getpixel((0, 0)) == (7, 8, 9)


def test_relative_paths_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert materialise([Prompt(0, "?", ("a/../x.png",))], "out") == [Prompt(0, "?", (str(tmp_path / "x.png"),))]
    assert not Path("out").exists()
