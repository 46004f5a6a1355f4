"""Inputs that people and tools write: prompts, answers, truth, results, records, the hub's answers, command lines."""

from __future__ import annotations

import io
import json
import shutil
import zipfile
from collections.abc import Mapping
from contextlib import redirect_stderr, redirect_stdout
from functools import cache
from importlib import import_module
from pathlib import Path
from random import Random
from typing import Any

import click
import openpyxl

from fuzz_judge import Files, Kind
from fuzz_mutations import ODD_TEXTS, changed, odd_bytes, odd_words, to_json
from fuzz_seeds import seeds
from polymerge.checkpoints.hub_api import listing
from polymerge.cli import polymerge
from polymerge.errors import PolymergeError, collecting, refuse_if_any
from polymerge.evaluation.comparison import compare_files
from polymerge.evaluation.comparison_text import gains_csv, markdown, plain_text, scores_csv
from polymerge.evaluation.harness import lmms_eval, vlmevalkit
from polymerge.evaluation.harness.logs import read_logs
from polymerge.evaluation.scoring import score_predictions, score_questions
from polymerge.inference.prompts import PromptSource, draw_prompts
from polymerge.paths import own_cache
from polymerge.reporting.page import embedded
from polymerge.reporting.reports import collect
from report_made import ablation, knockout, results, sampled_search, search

__all__ = ["KINDS"]


def _odd_json(value: Any, random: Random) -> bytes:
    return to_json(changed(value, random), random)


def _odd_lines(records: list[Any], random: Random) -> bytes:
    """JSON lines of which one or two are changed, or the bytes of all."""
    lines = [json.dumps(one).encode() for one in records]
    for _ in range(random.choice((1, 1, 2))):
        place = random.randrange(len(lines))
        lines[place] = random.choice((_odd_json(records[place], random), b"", b"[]", b"1", lines[place] + lines[place]))
    data = b"\n".join(lines) + random.choice((b"\n", b"", b"\r\n", b"\n\n"))
    return odd_bytes(data, random) if random.random() < 0.2 else data


# --- prompts, answers and truth


_PROMPTS: list[dict[str, Any]] = [
    {"id": 1, "text": "what?", "answer": "7"},
    {"question_id": "a", "question": "<image>\nwho?", "image": "x.png", "answers": ["b", "c"]},
    {"id": "q3", "prompt": "x", "images": [], "category": "k", "metadata": {"a": 1}},
    {"id": 4, "conversations": [{"from": "human", "value": "<image>hm"}, {"from": "gpt", "value": "ok"}]},
]


def _make_prompts(random: Random) -> Files:
    if random.random() < 0.3:
        return {"prompts.json": _odd_json(_PROMPTS[:3], random)}
    return {random.choice(("prompts.jsonl", "prompts.jsonl", "prompts.txt")): _odd_lines(_PROMPTS[:3], random)}


def _read_prompts(folder: Path) -> object:
    (file,) = folder.iterdir()
    with collecting():
        return draw_prompts(PromptSource(file))


_PREDICTIONS: list[dict[str, Any]] = [
    {"question_id": str(number), "prompt": "p", "text": text, "answer_id": "x", "model_id": "m", "metadata": {}}
    for number, text in enumerate(("A", "yes", "[0.1, 0.2, 0.5, 0.6]", None, "The answer is B."))
]
_QUESTIONS: list[dict[str, Any]] = [
    {"question_id": str(number), "image": f"t/{number}.png", "text": "<image>\nwhat?", "answer": answer,
     "answer_bbox": "[0.1,0.2,0.5,0.6]", "size": [32, 32], "category": "x"}
    for number, answer in enumerate(("A", "yes", "7", "no", "B"))
]  # fmt: skip
_TRUTH: dict[str, Any] = {
    "test.json": _QUESTIONS, "val.json": _QUESTIONS,
    "problems.json": {str(n): {"answer": n % 2, "choices": ["x", "y"], "image": "i.png",
    "question": "?"} for n in range(5)},
    "pid_splits.json": {"test": [str(n) for n in range(5)], "train": []},
}  # fmt: skip
_SCORED = ("ScienceQA", "REC", "VQAv2", "ImageNet", "TabMWP", "OCR-VQA")


def _make_truth(random: Random) -> Files:
    files = {name: json.dumps(value).encode() for name, value in _TRUTH.items()}
    files["predictions.jsonl"] = "\n".join(map(json.dumps, _PREDICTIONS)).encode()
    task = random.choice(
        (*_SCORED, "=exact", "=vqa", "=anls", "=relaxed", "=exact_normalised", "=mcq", "=letter", "=box_iou")
    )
    if random.random() < 0.4:
        files["predictions.jsonl"] = _odd_lines(_PREDICTIONS, random)
    else:
        name = "problems.json" if task == "ScienceQA" and random.random() < 0.7 else random.choice(list(_TRUTH))
        files[name] = _odd_json(_TRUTH[name], random)
    return {**files, "task": task.encode()}


def _read_truth(folder: Path) -> object:
    task = (folder / "task").read_text()
    if task.startswith("="):
        return score_questions(task[1:], folder / "predictions.jsonl", folder / "test.json")
    return score_predictions(task, folder / "predictions.jsonl", folder)


# --- answers and results of tools


_LOG: dict[str, Any] = {
    "args": {}, "model_configs": {"task": "mme"},
    "logs": [{"doc_id": place, "target": "x", "arguments": [["?"]], "resps": [["yes"]], "filtered_resps": ["yes"],
              "mme_percetion_score": {"category": "c", "score": 1.0}, "acc": 1.0} for place in range(3)],
}  # fmt: skip
_ROWS: list[dict[str, Any]] = [
    {"index": place, "question": "?", "answer": "A", "prediction": text, "hit": 1, "split": "val", "category": "x"}
    for place, text in enumerate(("yes", "=5", "<think>a</think>no"))
]
_OWN: list[dict[str, Any]] = [{"id": place, "answer": f"a{place}"} for place in range(3)]


@cache
def _sheet() -> bytes:
    book = openpyxl.Workbook()
    sheet = book.active
    assert sheet is not None
    sheet.append(list(_ROWS[0]))
    for row in _ROWS:
        sheet.append(list(row.values()))
    stream = io.BytesIO()
    book.save(stream)
    return stream.getvalue()


_ENTITIES = (
    b'<!DOCTYPE x [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;&a;">'
    b'<!ENTITY c "&b;&b;&b;&b;&b;&b;&b;&b;">'
    b'<!ENTITY d "&c;&c;&c;&c;&c;&c;&c;&c;"><!ENTITY e "&d;&d;&d;&d;&d;&d;&d;&d;">]>'
)


def _odd_sheet(random: Random) -> bytes:
    """A table as .xlsx: its archive is damaged, or the XML in it, or what a cell says of itself."""
    if random.random() < 0.3:
        return odd_bytes(_sheet(), random)
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(_sheet())) as archive, zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as made:
        chosen = random.choice([*archive.namelist(), *["xl/worksheets/sheet1.xml"] * 6])
        for name in archive.namelist():
            data = archive.read(name)
            if name == chosen:
                cell = b'<c r="A1"' if random.random() < 0.5 else b"<c "
                by = random.choice((b'<c r="XFD1048576"', b'<c r="A0"', b'<c r="ZZZZZ99999999999"',
                b'<c t="b" r="A1"',
                                    b'<c t="d" r="A1"', b'<c t="s" r="A1"', b'<c s="999"', b'<c r=""',
                                    b'<c t="e"'))  # fmt: skip
                data = random.choice(
                    (odd_bytes(data, random), data.replace(cell, by, 1),
                    _ENTITIES + data,
                     data.replace(b"<row ", b'<row r="99999999999" ', 1), data.replace(b"?>", b"?>" + _ENTITIES,
                     1),
                     data.replace(b"<v>0", b"<v>" + random.choice((b"1e400", b"-1", b"9" * 400, b"nan", b"",
                     b"&e;")), 1),
                     data.replace(b"dimension ref=", b"dimension ref='A1:XFD1048576' x=", 1))
                )  # fmt: skip
            made.writestr(name, data)
    return stream.getvalue()


def _table(separator: str, random: Random) -> bytes:
    lines = [separator.join(_ROWS[0]), *(separator.join(map(str, row.values())) for row in _ROWS)]
    place = random.randrange(len(lines))
    lines[place] = random.choice(
        (lines[place] + separator + "x", '"' + lines[place], lines[place].replace(separator, "", 1), "", "\x00",
         random.choice(ODD_TEXTS), f'"{"x" * 200_000}"{separator}1', separator * 500)
    )  # fmt: skip
    data = random.choice(("\n", "\r\n", "\r")).join(lines).encode("utf-8", "surrogatepass")
    return odd_bytes(data, random) if random.random() < 0.4 else data


def _make_logs(random: Random) -> Files:
    match random.randrange(6):
        case 0:
            name, data = "20240101_mme.json", _odd_json(_LOG, random)
        case 1:
            name, data = "20240101_120000_samples_mme.jsonl", _odd_lines(_LOG["logs"], random)
        case 2:
            name, data = "answers.jsonl", _odd_lines(_OWN, random)
        case 3:
            name, data = "model_MME.xlsx", _odd_sheet(random)
        case 4:
            name, data = "model_MME.tsv", _table("\t", random)
        case _:
            name, data = "model_MME.json", _odd_json(_ROWS, random)
    return {f"one/{name}": data}


def _read_logs(folder: Path) -> object:
    return read_logs([folder / "one"])


_LMMS: dict[str, Any] = {
    "results": {"mme": {"alias": "mme", "acc,none": 0.5, "acc_stderr,none": 0.1, "mme_score,none": "N/A"}},
    "n-samples": {"mme": {"original": 3, "effective": 3}}, "config": {}, "versions": {"mme": 0},
}  # fmt: skip
_SCORES = "split,Overall,x\nnone,0.5,1\n"


def _make_tool(random: Random) -> Files:
    if random.random() < 0.5:
        files = {"20240101_120000_results.json": json.dumps(_LMMS).encode(),
                 "20240101_120000_samples_mme.jsonl": "\n".join(map(json.dumps, _LOG["logs"])).encode()}  # fmt: skip
        name = random.choice(list(files))
        files[name] = _odd_json(_LMMS, random) if name.endswith(".json") else _odd_lines(_LOG["logs"], random)
        return files
    name = random.choice(("m_MME_acc.csv", "m_MME_score.csv", "m_MME_score.json", "m_MME_rating.json"))
    scores: Any = {"Overall": {"acc": 50.0, "x": [1, 2]}, "y": 3}
    data = _odd_json(scores, random) if name.endswith("json") else odd_bytes(_SCORES.encode(), random)
    more = {"m_MME.xlsx": _odd_sheet(random)} if random.random() < 0.3 else {}
    return {
        name: data,
        "m_MME.json": _odd_json(_ROWS, random) if random.random() < 0.5 else json.dumps(_ROWS).encode(),
        **more,
    }


def _read_tool(folder: Path) -> object:
    if any(file.name.startswith("m_") for file in folder.iterdir()):
        found, wrong = vlmevalkit.read(folder, "m", ["MME"], set(), folder / "log")
    else:
        found, wrong = lmms_eval.read(folder, ["mme"], set())
    refuse_if_any(wrong)
    return found


_RESULTS = {"read": [1.0] * 3 + [0.0] * 2, "sums": [1.0, 0.0] * 2}


def _make_results(random: Random) -> Files:
    value = results("m", "here", _RESULTS)
    return {
        "results.json": _odd_json(value, random),
        "other.json": json.dumps(results("o", "there", _RESULTS)).encode(),
    }


def _read_results(folder: Path) -> object:
    compared = compare_files([folder / "results.json", folder / "other.json"], template="o", resamples=10)
    return plain_text(compared), markdown(compared), scores_csv(compared), gains_csv(compared)


# --- records of runs


@cache
def _records() -> Mapping[str, Any]:
    place = seeds() / "records"
    made = {"search.json": search(), "search.json ": sampled_search(), "knockout.json": knockout([0.6, 0.9]),
            "ablation.json": ablation(), "results.json": results("m", "here", _RESULTS)}  # fmt: skip
    for name in ("polymerge.json", "overlap.json"):
        made[name] = json.loads((place / "merged" / name).read_text(encoding="utf-8"))
    return made


def _make_record(random: Random) -> Files:
    names = list(_records())
    name = random.choice([*names, "polymerge.json", "polymerge.json"])
    value = dict(_records()[name])
    inner = [key for key, held in value.items() if isinstance(held, dict | list) and held]
    if inner and random.random() < 0.7:  # deeper than a change at any depth usually gets
        key = random.choice(inner)
        value[key] = changed(value[key], random)
    else:
        value = changed(value, random)
    return {name.strip(): to_json(value, random)}


def _read_record(folder: Path) -> object:
    return embedded(collect([folder]))


# --- the hub


_COMMIT = "0" * 40
_INFO: dict[str,
Any] = {
    "_id": "1", "id": "a/b", "modelId": "a/b", "sha": _COMMIT, "private": False, "gated": False, "tags": [],
    "downloads": 1,
    "lastModified": "2024-01-01T00:00:00.000Z", "createdAt": "2024-01-01T00:00:00.000Z", "library_name": "transformers",
    "siblings": [
        {"rfilename": "config.json", "size": 100, "blobId": "b" * 40},
        {"rfilename": "model.safetensors", "size": 10**9, "blobId": "c" * 40,
         "lfs": {"sha256": "d" * 64, "size": 10**9, "pointerSize": 130}},
    ],
    "config": {"model_type": "llama"}, "cardData": {"license": "mit",
    "base_model": "a/c"},
    "safetensors": {"parameters": {"BF16": 10}, "total": 10}, "author": "a", "disabled": False,
    "likes": 0,
}  # fmt: skip
_PLACES = ("../x.safetensors", "/etc/passwd.json", "a/../../b.json", "a\\b.json", "", ".", "a" * 300 + ".json",
"a\x00.json",
           "\ud800.json", "con.json", "a//b.json", "~/x.json", "model.safetensors/x.json", "\n.json")  # fmt: skip


def _make_listing(random: Random) -> Files:
    info = json.loads(json.dumps(_INFO))
    if random.random() < 0.4:
        info["siblings"][random.randrange(2)]["rfilename"] = random.choice(_PLACES)
    elif random.random() < 0.6:
        info["siblings"] = changed(info["siblings"], random)
    else:
        info = changed(info, random)
    return {"answer": to_json(info, random)}


def _read_listing(folder: Path) -> object:
    from huggingface_hub import constants, set_client_factory
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.utils._http import default_client_factory

    # its library for HTTP, which is another one in some of its versions
    httpx = import_module(HfHubHTTPError.__bases__[0].__module__.partition(".")[0])
    answer = (folder / "answer").read_bytes()
    transport = httpx.MockTransport(
        lambda _: httpx.Response(200, content=answer, headers={"content-type": "application/json"})
    )
    set_client_factory(lambda: httpx.Client(transport=transport))
    offline, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, False
    try:
        listing.cache_clear()
        (own_cache("hub") / "a/b" / f"{_COMMIT}.json").unlink(missing_ok=True)
        return listing("a/b", _COMMIT)
    finally:
        constants.HF_HUB_OFFLINE = offline
        set_client_factory(default_client_factory)


# --- command lines


_COMMANDS = tuple(
    line.split()
    for line in """
    inspect @A @B
    inspect @A --json
    plan @RECIPE
    plan --template @A --with @B --method linear --weight 0.5,0.5
    merge --template @A --with @B --method ties --base @B -p density=0.5 --weight 0.3,0.7 -o @HERE/out --no-verify
    merge @RECIPE -o @HERE/out --dry-run --json
    fold @A --base @B -o @HERE/out
    verify @HERE
    overlap @RECIPE --json @HERE/overlap.json
    score --task VQAv2 @HERE/p.jsonl @HERE
    compare @HERE/results.json --resamples 10
    report @HERE -o @HERE/page
    methods
    families
    search @RECIPE --prompts @HERE/p.jsonl --vary weight=0:1:0.5 --dry-run
    knockout @A --against @B --task t=@HERE/p.jsonl
    ablate @RECIPE --task t=@HERE/p.jsonl
    """.strip().splitlines()
)
_VALUES = (
    "1" * 400, "-1", "0", "1e400", "nan", "1e-300", "0:1:1e-300", "0:1e12:1", "normalize=[",
    "density=&a [*a]",
    "weight=!!bool maybe",
    "=", "a=", "=a", "scale=1" + "0" * 5000, "~nosuchuser/x", "\x00", "x" * 256, "x/" * 3000, "\udcff", "", ".",
    "/",
    "/dev/null",
    "/dev/full", "@HERE/no/where", "@RECIPE", "meta", "cuda", "cuda:99", "mps", "9" * 400 + "GB", "1.5.5GB", "-5GB",
    "0", "1e9",
    "0-99999999999", "weight[99999999999]", "weight@layers:0-9999999999=0:1:0.1", "weight=0:1:0", "a/b", "a/b@c",
    "@A+@B", "@A+",
    "2024-01-01", "--", "-", "\ud800",
)  # fmt: skip


@cache
def _options() -> dict[str, tuple[str, ...]]:
    """The options of each command."""
    return {name: tuple(one for option in command.params for one in option.opts if one.startswith("-"))
            for name, command in polymerge.commands.items()}  # fmt: skip


_SLOW = {"demo", "evaluate"}


def _make_words(random: Random) -> Files:
    words = list(random.choice(_COMMANDS))
    more = _options()[words[0]]
    for _ in range(random.choice((1, 1, 2, 3))):
        place = random.randrange(1, len(words) + 1)
        match random.randrange(4):
            case 0:
                words[1:] = odd_words(words[1:], random, more)
            case 1 if more:
                words[place:place] = [random.choice(more), random.choice(_VALUES)]
            case _ if len(words) > 1:
                words[min(place, len(words) - 1)] = random.choice(_VALUES)
    return {"words.json": json.dumps(words).encode()}


def _read_words(folder: Path) -> object:
    for name in ("llama", "llama-llm"):  # of its own, for a path may be one that a command is told to write to
        shutil.copytree(seeds() / name, folder / name)
    places = {
        "@A": f"{folder}/llama",
        "@B": f"{folder}/llama-llm",
        "@RECIPE": f"{folder}/recipe.yaml",
        "@HERE": str(folder),
    }
    recipe = {"merge_method": "linear", "models": [places["@A"], places["@B"]], "parameters": {"weight": 0.5}}
    (folder / "recipe.yaml").write_text(json.dumps(recipe), encoding="utf-8")
    (folder / "p.jsonl").write_text(json.dumps(_PREDICTIONS[0]) + "\n", encoding="utf-8")
    (folder / "results.json").write_text(json.dumps(results("m", "here", _RESULTS)), encoding="utf-8")
    words = json.loads((folder / "words.json").read_text(encoding="utf-8"))
    for name, place in places.items():
        words = [word.replace(name, place) for word in words]
    if not words or words[0] in _SLOW:
        return None
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        try:
            return polymerge.main(args=words, prog_name="polymerge", standalone_mode=False)
        except (click.ClickException, click.exceptions.Exit, click.Abort) as error:
            raise PolymergeError(str(error)) from None  # the same to the one who counts
        except SystemExit as error:
            return error.code


KINDS = (
    Kind("prompts", _make_prompts, _read_prompts, 40),
    Kind("answers and truth", _make_truth, _read_truth, 40),
    Kind("answers of tools", _make_logs, _read_logs, 30),
    Kind("results of tools", _make_tool, _read_tool, 25),
    Kind("results", _make_results, _read_results, 20),
    Kind("records of runs", _make_record, _read_record, 25),
    Kind("hub listing", _make_listing, _read_listing, 20),
    Kind("command line", _make_words, _read_words, 6),
)
