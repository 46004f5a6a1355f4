"""Answers that exist already, as lmms-eval, VLMEvalKit and polymerge lay them out, and what is refused about them."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import openpyxl
import pytest

from logged import SEARCH, laid_out, logs_of_2024, put
from polymerge.errors import MissingExtraError, PolymergeError, Refused
from polymerge.evaluation.harness import logs as room
from polymerge.evaluation.harness.logs import Logs
from polymerge.inference.prompts import sample
from polymerge.tuning.from_logs import choose_from_logs, value_folders

VALUES = ("0.1", "0.2", "0.3")


def lines(*rows: Any) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def own(*answers: str) -> str:
    return lines(*({"id": place, "answer": answer} for place, answer in enumerate(answers)))


def sheet(path: Path, *rows: tuple[Any, ...]) -> Path:
    book = openpyxl.Workbook()
    assert book.active is not None
    for row in rows:
        book.active.append(row)
    path.parent.mkdir(parents=True, exist_ok=True)
    book.save(path)
    return path


def everywhere(root: Path, name: str, text: str) -> Path:
    """The same file in the folder of each value."""
    for value in VALUES:
        put(root / f"alpha-{value}" / name, text)
    return root


def read_logs(root: Path, **options: Any) -> Logs:
    return room.read_logs(list(value_folders(root)[0].values()), **options)


def refused(root: Path, **options: Any) -> str:
    with pytest.raises(PolymergeError) as error:
        read_logs(root, **options)
    assert error.value.exit_status == 2
    return str(error.value)


# formats


def test_own_answers(tmp_path: Path) -> None:
    for value in ("0.3", "0.1", "1"):
        put(tmp_path / f"alpha-{value}" / "answers.jsonl", own("Cat", f"it is {value}"))
    put(tmp_path / "report.json", "not for us")
    put(tmp_path / ".cache" / "answers.jsonl", "not for us")
    put(tmp_path / "alpha-0.1" / "config.json", "{}")
    (tmp_path / "plots").mkdir()
    expected = Logs(
        answers=tuple({0: "Cat", 1: f"it is {value}"} for value in ("0.1", "0.3", "1")),
        scores=(None, None, None),
        files=tuple(tmp_path / f"alpha-{value}" / "answers.jsonl" for value in ("0.1", "0.3", "1")),
        notes=(),
    )
    assert read_logs(tmp_path) == expected
    assert read_logs(tmp_path, task="mme") == expected


def test_ids_come_in_order_and_are_of_one_kind(tmp_path: Path) -> None:
    rows = [{"id": number, "answer": f"a{number}"} for number in (10, 9)]
    everywhere(tmp_path, "answers.jsonl", lines(*rows, rows[0]) + "\n")
    assert list(read_logs(tmp_path).answers[0]) == [9, 10]
    put(tmp_path / "alpha-0.1" / "answers.jsonl", lines({"id": "9", "answer": "a9"}, rows[0]))
    logs = read_logs(tmp_path)
    assert all(list(one.items()) == [("10", "a10"), ("9", "a9")] for one in logs.answers)


@pytest.mark.parametrize("asked", ["ok_vqa", "ok_vqa_val2014", None])
def test_a_log_of_2024(tmp_path: Path, asked: str | None) -> None:
    for value in VALUES:
        run = tmp_path / f"alpha-{value}" / "0919_0609_model_ok_vqa_model_args_33e15b"
        put(run / "ok_vqa_val2014.json", logs_of_2024("Cat ", "", value, exact_match=0.5))
        put(run / "results.json", "{}")
        put(run / "rank0_config.json", "[1]")
    logs = read_logs(tmp_path, task=asked)
    assert logs.answers[1] == {0: "Cat ", 1: "", 2: "0.2"}
    assert logs.scores == (0.5, 0.5, 0.5)
    assert logs.notes == ()


def test_the_exact_name_of_a_task_comes_first(tmp_path: Path) -> None:
    everywhere(tmp_path, "textvqa_val.json", logs_of_2024("yes"))
    everywhere(tmp_path, "textvqa_val_lite.json", logs_of_2024("no"))
    everywhere(tmp_path, "cot_textvqa_val.json", logs_of_2024("maybe"))
    assert read_logs(tmp_path, task="textvqa_val").answers[0] == {0: "yes"}
    message = refused(tmp_path, task="textvqa")
    assert "can mean 'textvqa_val', 'textvqa_val_lite'" in message


@pytest.mark.parametrize(
    "fields",
    [
        {"filtered_resps": ["yes"]},
        {"filtered_resps": "yes"},
        {"filtered_resps": ["yes"], "resps": [["YES"]]},
        {"filtered_resps": "yes", "resps": ["<think>YES?</think>yes"]},
        {"filtered_resps": None, "resps": [["yes"]]},
        {"filtered_resps": [["yes"]], "resps": None},
    ],
)
def test_lines_of_today(tmp_path: Path, fields: dict[str, Any]) -> None:
    rows = [{"doc_id": number, "target": "x", "input": "?", "doc_hash": "0", **fields} for number in range(2)]
    everywhere(tmp_path, "a__b/20250919_060912_samples_gqa.jsonl", lines(*rows))
    everywhere(tmp_path, "a__b/20250919_060912_results.json", "{}")
    everywhere(tmp_path, "a__b/submissions/gqa.json", "{}")
    logs = read_logs(tmp_path)
    assert logs.answers == ({0: "yes", 1: "yes"},) * 3
    assert logs.scores == (None,) * 3


def lm_eval_row(number: int, *likely: str, before: str = "", **fields: Any) -> dict[str, Any]:
    """A document of lm-eval with three choices, or with one context for each of two choices."""
    after = ["it goes on"] * len(likely) if before else [f" choice {place}" for place in range(len(likely))]
    asked = {
        f"gen_args_{place}": {"arg_0": f"{before} {place}" if before else "What?", "arg_1": one}
        for place, one in enumerate(after)
    }
    return {"doc_id": number, "filter": "none", "metrics": ["acc"], "arguments": asked,
            "filtered_resps": [[one, "False"] for one in likely], **fields}  # fmt: skip


def test_samples_of_lm_eval(tmp_path: Path) -> None:
    """Of choices it is the one with the largest log-likelihood; of filters the first."""
    choices = [lm_eval_row(0, "-2.5", "-1.5", "-12", acc=1.0), lm_eval_row(1, "-3", "-2", before="If", acc=0.0)]
    said = [{"doc_id": 0, "filter": name, "resps": [["It is 7."]], "filtered_resps": text, "exact_match": 1.0}
            for name, text in (("strict", ["7"]), ("flexible", ["It is 7."]))]  # fmt: skip
    everywhere(tmp_path, "w__m/samples_arc_easy_2026-11-30T20-24-40.543470.jsonl", lines(*choices))
    everywhere(tmp_path, "w__m/samples_gsm8k_2026-11-30T20-24-40.543470.jsonl", lines(*said))
    everywhere(tmp_path, "w__m/results_2026-11-30T20-24-40.543470.json", "{}")
    logs = read_logs(tmp_path, task="arc_easy")
    assert (logs.answers[0], logs.scores[0], logs.notes) == ({0: "choice 1", 1: "1"}, 0.5, ())
    logs = read_logs(tmp_path, task="gsm8k")
    assert (logs.answers[0], logs.scores[0]) == ({0: "7"}, 1.0)
    assert logs.notes[0].endswith("40.543470.jsonl: answers as the filter strict finds them, not flexible")
    everywhere(tmp_path, "w__m/samples_gsm8k_2026-12-01T20-24-40.543470.jsonl", lines(said[1]))
    assert read_logs(tmp_path, task="gsm8k").answers[0] == {0: "It is 7."}
    twice = lm_eval_row(0, "-1", "-2")
    twice["arguments"]["gen_args_1"]["arg_0"] = ""  # of what is left when the question is taken away
    everywhere(tmp_path, "w__m/samples_other_2026-11-30T20-24-40.543470.jsonl", lines(twice))
    assert "a log-likelihood instead of a response" in refused(tmp_path, task="other")


def test_what_was_scored_is_compared(tmp_path: Path) -> None:
    # by hand, of ten documents: 8 change around 0.1, 5 around 0.2, 1 around 0.4; the thoughts change everywhere
    changed = {"0.0": 0, "0.1": 4, "0.2": 8, "0.4": 9, "0.6": 9}
    for value, count in changed.items():
        said = ["no" if place < count else "yes" for place in range(10)]
        rows = [
            {"doc_id": place, "resps": [f"<think>{value}: {place}</think>{text}"], "filtered_resps": [text]}
            for place, text in enumerate(said)
        ]
        put(tmp_path / f"alpha_{value}" / "s_samples_gqa.jsonl", lines(*rows))
    found = choose_from_logs(tmp_path).outcome
    assert found["chosen"] == 0.4
    assert dict(zip(found["candidates"], found["differences"], strict=True)) == {0.1: 8, 0.2: 5, 0.4: 1}


@pytest.mark.parametrize("tool", ["lmms-eval", "VLMEvalKit", "polymerge"])
def test_thoughts_in_the_answer_that_was_scored_are_not_compared(tool: str, tmp_path: Path) -> None:
    forms = ("<think>{}</think>\n\n{}", "{}</think> {}", "<analysis>{}</analysis>{}")
    texts = {value: [forms[place].format(f"{value}?", "yes") for place in range(3)] for value in VALUES}
    texts["0.2"][2] = "<analysis>0.2?</analysis>no"
    for value, (one, two, three) in texts.items():
        unended, plain = "<think>yes", "<think>no</think>"  # thoughts alone, which the tool has scored too
        answers = (one, two, three, unended, plain)
        folder = tmp_path / f"alpha-{value}"
        if tool == "lmms-eval":
            put(folder / "x_samples_mme.jsonl", lines(*(
                {"doc_id": place, "filtered_resps": [answer]} for place, answer in enumerate(answers)
            )))  # fmt: skip
        elif tool == "VLMEvalKit":
            rows = [{"index": place, "question": "?", "prediction": answer} for place, answer in enumerate(answers)]
            put(folder / "model_MME.json", json.dumps(rows))
        else:
            put(folder / "answers.jsonl", own(*answers))
    read = read_logs(tmp_path)
    if tool == "polymerge":  # its own search has compared them whole
        assert (list(read.answers[0].values()), read.notes) == ([*texts["0.1"], "<think>yes", "<think>no</think>"], ())
        return
    assert [list(one.values())[:3] for one in read.answers] == [["yes"] * 3, ["yes", "yes", "no"], ["yes"] * 3]
    assert list(read.answers[0].values())[3:] == ["<think>yes", "<think>no</think>"]
    assert read.notes == (
        "answers begin with a model's thoughts, and what follows these is compared: alpha-0.1 3; alpha-0.2 3; "
        "alpha-0.3 3",
    )


FAILED = "Failed to obtain answer via API."


@pytest.mark.parametrize(
    "message",
    [
        FAILED,
        "Failed to obtain answer via API. : Failed with all possible conversation turns.",
        "Failed to obtain answer: RuntimeError CUDA error: device-side assert triggered",
        "Fail to obtain answer via API.",
        "[LMMS_EVAL_REQUEST_FAILED after 3 retries] Connection reset by peer",
        "Video /data/7.mp4 generate failed, check the source",
    ],
)
def test_a_message_of_a_failure_is_no_answer(message: str, tmp_path: Path) -> None:
    said = {"0.1": ["a", message, "c", ""], "0.2": ["a", "b", "c", ""], "0.3": [f" {message}\n", "b", "c", ""]}
    for value, answers in said.items():
        rows = "".join(f'{place}\t"{text}"\n' for place, text in enumerate(answers))
        put(tmp_path / f"alpha-{value}" / f"alpha-{value}_MME.tsv", f"index\tprediction\n{rows}")
    logs = read_logs(tmp_path, task="MME")
    assert logs.answers == ({2: "c", 3: ""},) * 3
    assert logs.notes == (
        "2 of 4 documents are left out, for a tool's message of a failed request is no answer: alpha-0.1 1 (1); "
        "alpha-0.3 1 (0)",
    )


def test_a_request_that_failed_is_no_change(tmp_path: Path) -> None:
    # a candidate whose API broke down twice answers otherwise as its neighbours do
    for value, answers in {"0": "aaaa", "0.2": "FaaF", "0.4": "aabb", "0.6": "aaaa"}.items():
        rows = [{"doc_id": n, "filtered_resps": FAILED if one == "F" else one} for n, one in enumerate(answers)]
        put(tmp_path / f"alpha-{value}" / "s_samples_gqa.jsonl", lines(*rows))
    found = choose_from_logs(tmp_path).outcome
    assert dict(zip(found["candidates"], found["differences"], strict=True)) == {0.2: 1, 0.4: 1}
    assert found["prompts"] == 2
    assert "2 of 4 documents are left out" in found["notes"][0]


def test_a_run_that_failed_altogether(tmp_path: Path) -> None:
    everywhere(tmp_path, "s_samples_gqa.jsonl", lines({"doc_id": 0, "filtered_resps": "a"}))
    put(tmp_path / "alpha-0.2" / "s_samples_gqa.jsonl", lines({"doc_id": 0, "filtered_resps": FAILED}))
    message = refused(tmp_path)
    assert "of 1 documents there is none that every candidate has an answer to" in message
    assert "alpha-0.2 1 (0). Generate these answers again" in message


def test_an_answer_that_speaks_of_failing_is_one(tmp_path: Path) -> None:
    said = "The student failed to obtain an answer."
    everywhere(tmp_path, "s_samples_gqa.jsonl", lines({"doc_id": 0, "filtered_resps": said}))
    assert read_logs(tmp_path).answers[0] == {0: said}


def test_mmmu_is_read_through_its_filter(tmp_path: Path) -> None:
    row = {"doc_id": 0, "resps": [["The answer is B"]], "filtered_resps": ["B"]}
    everywhere(tmp_path, "mmmu_val.json", json.dumps({"logs": [row]}))
    assert read_logs(tmp_path, task="mmmu_val").answers[0] == {0: "B"}
    everywhere(tmp_path, "s_samples_mmmu_pro.jsonl", lines({**row, "filtered_resps": "C"}))
    assert read_logs(tmp_path, task="mmmu_pro").answers[0] == {0: "C"}


def test_of_several_responses_the_first_is_read_and_told(tmp_path: Path) -> None:
    everywhere(
        tmp_path, "s_samples_gqa.jsonl", lines({"doc_id": 0, "resps": [["a", "b"]]}, {"doc_id": 1, "resps": "c"})
    )
    logs = read_logs(tmp_path)
    assert logs.answers[0] == {0: "a", 1: "c"}
    assert len(logs.notes) == 3
    assert "alpha-0.1" in logs.notes[0]
    assert "of which the first is read: 1" in logs.notes[0]


def test_scores_are_told_only_where_they_are_clear(tmp_path: Path) -> None:
    def scored(**fields: Any) -> float | None:
        everywhere(tmp_path, "ocr.json", logs_of_2024("a", "b", **fields))
        return read_logs(tmp_path).scores[0]

    assert scored(ocr_accuracy={"question": "q", "score": 1}) == 1.0
    assert scored(exact_match=0.25, submission={"id": 3}) == 0.25
    assert scored(one=1.0, two=0.5) is None
    assert scored(one=float("nan")) is None
    assert scored(one=10**400) is None
    assert scored() is None


@pytest.mark.parametrize("kind", ["xlsx", "tsv", "json"])
@pytest.mark.parametrize("model", ["alpha-{}", "Qwen2-VL-{}"])
def test_tables_of_vlmevalkit(tmp_path: Path, kind: str, model: str) -> None:
    table = [(3, "Q", "Cat, dog"), (20, "Q", 7), (100, "Q", None), (101, "Q", 0.5)]
    names = ("index", "question", "prediction")
    for value in VALUES:
        stem = tmp_path / f"alpha-{value}" / "T20250101_G0a1b2c3d" / f"{model.format(value)}_MMMU_DEV_VAL"
        file = stem.with_name(f"{stem.name}.{kind}")
        if kind == "xlsx":
            sheet(file, names, *table)
        elif kind == "tsv":
            cells = [names, *(tuple("" if cell is None else str(cell) for cell in row) for row in table)]
            put(file, "".join("\t".join(f'"{cell}"' for cell in row) + "\n" for row in cells))
        else:
            rows = [dict(zip(names, row, strict=True)) for row in table]
            rows[2]["prediction"] = float("nan")  # how pandas writes an empty cell
            put(file, json.dumps(rows))
        put(stem.with_name(f"{stem.name}_acc.csv"), "1")
        put(stem.with_name(f"{stem.name}_score.json"), "{}")
        put(stem.with_name(f"{stem.name}_openai_result.xlsx"), "not read")
        put(stem.with_name("status.json"), "{}")
    logs = read_logs(tmp_path, task="MMMU_DEV_VAL")
    assert logs.answers == ({3: "Cat, dog", 20: "7", 100: "", 101: "0.5"},) * 3
    assert logs.scores == (None,) * 3
    if "alpha" in model:
        assert read_logs(tmp_path) == logs
    else:
        assert "'Qwen2-VL-0.1_MMMU_DEV_VAL'" in refused(tmp_path)


def test_a_sheet_is_read_as_it_is_shown(tmp_path: Path) -> None:
    for value in VALUES:
        rows = [("index", "prediction", None), (1.0, "=1+1"), (), ("2", True), ("x", None)]
        sheet(tmp_path / f"alpha-{value}" / "m_DocVQA.xlsx", *rows)
    assert read_logs(tmp_path, task="DocVQA").answers[0] == {"1": "=1+1", "2": "True", "x": ""}


def test_a_table_with_long_and_broken_lines(tmp_path: Path) -> None:
    long = "x" * 200_000
    everywhere(tmp_path, "m_DocVQA.tsv", f'\ufeffindex\tprediction\r\n0\t"two\nlines and a ""quote"""\r\n1\t{long}\r\n')
    logs = read_logs(tmp_path, task="DocVQA")
    assert logs.answers[0] == {0: 'two\nlines and a "quote"', 1: long}


def test_without_openpyxl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    everywhere(tmp_path, "m_DocVQA.xlsx", "")
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    with pytest.raises(Refused, match=r"m_DocVQA.xlsx: needs openpyxl: pip install") as refused:
        read_logs(tmp_path, task="DocVQA")
    assert all(isinstance(problem, MissingExtraError) for problem in refused.value.problems)


# several runs


def test_the_newest_run_is_read_and_the_others_are_told(tmp_path: Path) -> None:
    everywhere(tmp_path, "m/20250919_060912_samples_mme.jsonl", lines({"doc_id": 0, "resps": "old"}))
    everywhere(tmp_path, "m/20250920_000000_samples_mme.jsonl", lines({"doc_id": 0, "resps": "new"}))
    logs = read_logs(tmp_path, task="mme")
    assert logs.answers == ({0: "new"},) * 3
    assert logs.files[0].name == "20250920_000000_samples_mme.jsonl"
    assert (
        "read m/20250920_000000_samples_mme.jsonl, passed over 'm/20250919_060912_samples_mme.jsonl'" in logs.notes[0]
    )


@pytest.mark.parametrize(
    ("older", "newer"),
    [
        ("T20250101_Gffff0000", "T20250102_G00000000"),
        ("T20250101_Gffff0000", "T20250101_extra/T20250102-101500"),
        ("T20250101-101500", "T20250101-101501"),
    ],
)
def test_folders_of_runs_go_by_their_name(tmp_path: Path, older: str, newer: str) -> None:
    for run, answer in ((older, "old"), (newer, "new")):
        everywhere(tmp_path, f"{run}/m_MME.json", json.dumps([{"index": 0, "prediction": answer}]))
    logs = read_logs(tmp_path, task="MME")
    assert logs.answers[0] == {0: "new"}
    assert f"passed over '{older}/m_MME.json'" in logs.notes[0]


def test_a_file_under_several_names_counts_once(tmp_path: Path) -> None:
    everywhere(tmp_path, "T20250101_G0/m_MME.json", json.dumps([{"index": 0, "prediction": "a"}]))
    (tmp_path / "alpha-0.1" / "m_MME.json").symlink_to("T20250101_G0/m_MME.json")
    shutil.copy(tmp_path / "alpha-0.2" / "T20250101_G0" / "m_MME.json", tmp_path / "alpha-0.2")
    (tmp_path / "alpha-0.3" / "m_MME.json").symlink_to("/where/it/no/longer/is.json")
    logs = read_logs(tmp_path, task="MME")
    assert logs.notes == ()
    assert {file.parent.name for file in logs.files} == {"T20250101_G0"}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("x/m_MME.json", "y/m_MME.json"),
        ("m_MME.json", "T20250101_G0/m_MME.json"),
        ("T20250101_G0/m_MME.json", "T20250101_G1/m_MME.json"),
        ("T20250101_G0/m_MME.json", "T20250101-101500/m_MME.json"),
    ],
)
def test_runs_that_cannot_be_told_apart(tmp_path: Path, one: str, other: str) -> None:
    for run, answer in ((one, "a"), (other, "b")):
        everywhere(tmp_path, run, json.dumps([{"index": 0, "prediction": answer}]))
    message = refused(tmp_path, task="MME")
    assert message.startswith("3 problems")
    assert str(tmp_path / "alpha-0.1" / one) in message
    assert str(tmp_path / "alpha-0.1" / other) in message


# tasks


def test_which_task_has_to_be_said_where_there_are_several(tmp_path: Path) -> None:
    everywhere(tmp_path, "mme.json", logs_of_2024("a"))
    everywhere(tmp_path, "s_samples_gqa.jsonl", lines({"doc_id": 0, "resps": "b"}))
    everywhere(tmp_path, "config.json", "{}")
    assert "several tasks: 'gqa', 'mme'. Name one with `task`" in refused(tmp_path)
    assert "task mne: no candidate has answers to it. Did you mean 'mme'?" in refused(tmp_path, task="mne")
    assert "Known: gqa, mme." in refused(tmp_path, task="seedbench")
    everywhere(tmp_path, "answers.jsonl", own("c"))
    assert "'answers.jsonl', 'gqa', 'mme'" in refused(tmp_path)
    assert "Did you mean 'mme'" in refused(tmp_path, task="mne")  # nobody knows which task the third is
    assert read_logs(tmp_path, task="answers.jsonl").answers[0] == {0: "c"}


def test_a_directory_without_answers(tmp_path: Path) -> None:
    for value in VALUES:
        put(tmp_path / f"alpha-{value}" / "results.json", "{}")
        put(tmp_path / f"alpha-{value}" / "config.json", "{}")
    for task in ("mme", None):
        assert "the folders hold no answers" in refused(tmp_path, task=task)


def test_a_candidate_without_the_task(tmp_path: Path) -> None:
    everywhere(tmp_path, "mme.json", logs_of_2024("a"))
    (tmp_path / "alpha-0.2" / "mme.json").rename(tmp_path / "alpha-0.2" / "gqa.json")
    (tmp_path / "alpha-0.3" / "mme.json").unlink()
    message = refused(tmp_path, task="mme")
    assert f"{tmp_path / 'alpha-0.2'}: no answers to 'mme', it has 'gqa'" in message
    assert f"{tmp_path / 'alpha-0.3'}: no answers to 'mme', it has no answers at all" in message


# having


@pytest.mark.parametrize("asked", ["mme_percetion_score", "mme_perception_score"])
@pytest.mark.parametrize("written", ["mme_percetion_score", "mme_perception_score"])
def test_only_documents_with_a_field(tmp_path: Path, asked: str, written: str) -> None:
    rows = [{"doc_id": 0, "resps": [[None]]}, {"doc_id": 1, "resps": "a", written: {"score": 1}}]
    everywhere(tmp_path, "s_samples_mme.jsonl", lines(rows[0], *rows))  # what is dropped may be as it likes
    logs = read_logs(tmp_path, having=asked)
    assert logs.answers[0] == {1: "a"}
    assert logs.scores[0] == 1.0


def test_a_field_that_no_document_has(tmp_path: Path) -> None:
    everywhere(tmp_path, "mme.json", logs_of_2024("a", "b", mme_score=1))
    put(tmp_path / "alpha-0.2" / "mme.json", logs_of_2024("a", "b", mme_percetion_score=1))
    message = refused(tmp_path, having="mme_percetion_score")
    assert message.startswith("2 problems")
    assert (
        "none of 2 documents has 'mme_percetion_score'. Its fields: arguments, doc_id, filtered_resps, mme_sc"
        in message
    )


def test_keep_in_own_answers_and_tables(tmp_path: Path) -> None:
    everywhere(tmp_path, "answers.jsonl", lines({"id": 1, "answer": "a"}, {"id": 2, "answer": "b", "hard": True}))
    assert read_logs(tmp_path, having="hard").answers[0] == {2: "b"}
    everywhere(tmp_path, "m_MME.tsv", "index\tprediction\thard\n0\ta\t\n1\tb\tx\n")
    assert read_logs(tmp_path, task="MME", having="hard").answers[0] == {1: "b"}


# alignment


def test_candidates_that_answered_other_documents(tmp_path: Path) -> None:
    everywhere(tmp_path, "answers.jsonl", own(*"abcdefghij"))
    put(tmp_path / "alpha-0.4" / "answers.jsonl", own(*"abc"))
    put(tmp_path / "alpha-0.5" / "answers.jsonl", own(*"abcdefghijk"))
    message = refused(tmp_path)
    assert (
        "do not answer the same 10 documents: alpha-0.4 lacks 7 (3, 4, 5, 6, 7, ...); alpha-0.5 has 1 (10) more"
        in message
    )


# broken files


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (b"", "holds no documents"),
        (b"\n", "holds no documents"),
        (b'{"id": 0, "answer": "a"}\n{"id": 1, "ans', "line 2: is not JSON"),
        (b'{"id": 0, "answer": "a\xff"}', "line 1: is not UTF-8: byte 22 is 0xff"),
        (b"null\n[1]", "line 1, line 2: no JSON object"),
        (b"[" * 100_000, "line 1: is nested too deeply"),
        (b'{"id": ' + b"1" * 5000 + b"}", "line 1: cannot be read"),
        (b'{"answer": "a"}', "line 1: no 'id' that is a whole number or a text"),
        (b'{"id": 1.5, "answer": "a"}', "line 1: no 'id'"),
        (b'{"id": true, "answer": "a"}', "line 1: no 'id'"),
        (b'{"id": "", "answer": "a"}', "line 1: no 'id'"),
        (b'{"id": 0}', "id 0 (line 1): no 'answer' that is a text"),
        (b'{"id": 0, "answer": NaN}', "id 0 (line 1): no 'answer' that is a text"),
        (b'{"id": 0, "answer": "\\ud800"}', "id 0 (line 1): half a surrogate pair"),
        (b'{"id": 0, "answer": "a"}\n\n{"id": 0, "answer": "b"}', "id 0 (line 1 and line 3): the same 'id' twice"),
        (b'{"id": 7, "answer": "a"}\n{"id": "7", "answer": "b"}', "id 7 (line 1 and line 2): the same 'id' twice"),
    ],
    ids=lambda value: f"{len(value)} bytes" if isinstance(value, bytes) else value[:30],
)
def test_broken_answers_of_our_own(tmp_path: Path, text: bytes, problem: str) -> None:
    everywhere(tmp_path, "answers.jsonl", own("a"))
    broken = tmp_path / "alpha-0.2" / "answers.jsonl"
    broken.write_bytes(text)
    message = refused(tmp_path)
    assert message.startswith("1 problem,")
    assert f"{broken}: {problem}" in message


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({}, "no response"),
        ({"resps": None}, "no response"),
        ({"resps": [[None]]}, "no text in 'resps' but null"),
        ({"resps": [[{}]]}, "no text in 'resps' but an object"),
        ({"resps": [[3]]}, "no text in 'resps' but a number"),
        ({"resps": [[]]}, "an empty list in 'resps'"),
        ({"resps": [[[-1.5, False]], [[-2.5, True]]]}, "a log-likelihood instead of a response in 'resps'"),
        ({"filtered_resps": [["-1.5", "False"], ["-2.5", "True"]]}, "a log-likelihood instead of a response"),
    ],
)
def test_responses_that_are_no_text(tmp_path: Path, fields: dict[str, Any], problem: str) -> None:
    everywhere(tmp_path, "s_samples_gqa.jsonl", lines({"doc_id": 41, **fields}))
    assert f"s_samples_gqa.jsonl: doc_id 41 (line 1): {problem}" in refused(tmp_path)
    everywhere(tmp_path, "gqa2.json", json.dumps({"logs": [{"doc_id": 41, **fields}]}))
    assert f"gqa2.json: doc_id 41 (logs[0]): {problem}" in refused(tmp_path, task="gqa2")


def test_many_problems_of_one_kind_are_one(tmp_path: Path) -> None:
    rows = [{"doc_id": number, "resps": None} for number in range(50)]
    everywhere(tmp_path, "s_samples_gqa.jsonl", lines(*rows, {"doc_id": "x", "resps": 1}))
    with pytest.raises(Refused) as error:
        read_logs(tmp_path)
    assert len(error.value.problems) == 6
    assert "doc_id 0 (line 1), doc_id 1 (line 2), doc_id 2 (line 3) and 47 more: no response" in str(error.value)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "is not JSON: Expecting value at column 1"),
        ("3", "neither a log of lmms-eval nor a table"),
        ("null", "neither a log of lmms-eval nor a table"),
        ("{}", "neither a log of lmms-eval nor a table"),
        ("[]", "holds no documents"),
        ('{"logs": {}}', "'logs' is no list"),
        ('{"logs": []}', "holds no documents"),
        ('{"logs": [3]}', "logs[0]: no JSON object"),
        ('[{"prediction": "a"}]', "no column 'index' (columns: prediction)"),
        ('[{"index": 0, "prediction": "a"}, 3]', "record 1: no JSON object"),
        ('[{"index": 0, "prediction": ["a"]}]', "index 0 (record 0): no text in 'prediction'"),
        ('[{"index": null, "prediction": "a"}]', "record 0: no 'index'"),
        (
            '[{"index": 0, "prediction": "a"}, {"index": 0.0, "prediction": "a"}]',
            "index 0 (record 0 and record 1): the same",
        ),
        ('{"index": [0, 1], "prediction": ["a", "b"]}', "neither a log of lmms-eval nor a table"),
    ],
)
def test_broken_json(tmp_path: Path, text: str, problem: str) -> None:
    everywhere(tmp_path, "m_MME.json", text)
    message = refused(tmp_path, task="MME")
    assert message.startswith("3 problems")
    assert f"m_MME.json: {problem}" in message


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (b"", "no column 'index' and 'prediction' (columns: none)"),
        (b"index\tanswer\n0\ta\n", "no column 'prediction' (columns: index, answer)"),
        (b"index\tprediction\n", "holds no documents"),
        (b"index\tprediction\n0\ta\tb\n1\n", "line 2, line 3: the header has 2 cells, this has more or fewer"),
        (b"index\tprediction\n0\t\xff\n", "is not UTF-8: byte 19 is 0xff"),
        (b'index\tprediction\n0\t"a', "line 2: not a table, unexpected end of data"),
        (b"index\tprediction\n0\ta\n0\tb\n", "index 0 (line 2 and line 3): the same 'index' twice"),
        (b"index\tprediction\n\ta\n", "line 2: no 'index' that is"),
    ],
)
def test_broken_tables(tmp_path: Path, text: bytes, problem: str) -> None:
    everywhere(tmp_path, "m_MME.tsv", "index\tprediction\n0\ta\n")
    (tmp_path / "alpha-0.3" / "m_MME.tsv").write_bytes(text)
    message = refused(tmp_path, task="MME")
    assert message.startswith("1 problem,")
    assert f"m_MME.tsv: {problem}" in message


def test_broken_sheets(tmp_path: Path) -> None:
    put(tmp_path / "alpha-0.1" / "m_MME.xlsx", "no zip")
    sheet(tmp_path / "alpha-0.2" / "m_MME.xlsx", ("index",), (0, "a"))
    sheet(tmp_path / "alpha-0.3" / "m_MME.xlsx", ("index", "prediction"), (0, "a", "b"), (1, "a"), (1, "b"))
    sheet(tmp_path / "alpha-0.4" / "m_MME.xlsx")
    message = refused(tmp_path, task="MME")
    assert "alpha-0.1/m_MME.xlsx: not an .xlsx file that can be read, BadZipFile" in message
    assert "alpha-0.2/m_MME.xlsx: no column 'prediction' (columns: index)" in message
    assert "alpha-0.3/m_MME.xlsx: row 2: the header has 2 cells" in message
    assert "alpha-0.3/m_MME.xlsx: index 1 (row 3 and row 4): the same 'index' twice" in message
    assert "alpha-0.4/m_MME.xlsx: no column 'index' and 'prediction' (columns: none)" in message


def test_links_that_lead_nowhere(tmp_path: Path) -> None:
    everywhere(tmp_path, "answers.jsonl", own("a"))
    link = tmp_path / "alpha-0.2" / "answers.jsonl"
    link.unlink()
    link.symlink_to("gone.jsonl")
    assert f"{link}: cannot be read, No such file or directory. Is it a link" in refused(tmp_path)
    link.unlink()
    os.mkfifo(link)  # opening it would wait for ever
    assert "alpha-0.2: no answers.jsonl, it has no answers at all" in refused(tmp_path)


# the reference


@pytest.mark.parametrize("case", sorted(path.stem for path in SEARCH.glob("*.json")))
def test_differences_are_those_of_the_paper(case: str, tmp_path: Path) -> None:
    golden, root = laid_out(case, tmp_path)
    having = "mme_percetion_score" if case == "limit_mme" else None
    values = list(value_folders(root)[0])
    logs = read_logs(root, task=golden["task"], having=having)
    assert [root / name for name in sorted(golden["answers"])] == list(logs.files)
    expected = golden["expected"]["smooth0"]
    ids = list(logs.answers[0])
    if case == "limit_textvqa_sampled":
        assert len(ids) == 120
        ids = sample(ids, 100, 2)
    said = [[answers[number].lower() for number in ids] for answers in logs.answers]
    last = len(said) - 1
    differences, candidates = [], []
    for place in range(1, last if case.startswith("limit") else last + 1):
        count = 0
        for document in range(len(ids)):
            before, here = said[place - 1][document], said[place][document]
            after = said[place + 1][document] if case.startswith("limit") else here
            count += not before == here == after
        differences.append(count)
        candidates.append(values[place])
    assert differences == expected["differences"]
    assert candidates == [float(name) for name in expected["candidates"]]
    lowest = [value for value, count in zip(candidates, differences, strict=True) if count == min(differences)]
    assert lowest == [float(name) for name in expected["chosen_alphas"]]
