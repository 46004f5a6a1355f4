"""Reports: what is collected, what is refused, what is suggested, and that a page is whole, safe and small."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from polymerge import charts
from polymerge.cli.report import report as report_command
from polymerge.engine.provenance import plan_table, provenance
from polymerge.errors import MissingExtraError, PolymergeError, Refused
from polymerge.planning.plan import Piece, Plan, Step
from polymerge.reporting import reports as making
from polymerge.reporting.page import make_page, vega
from polymerge.reporting.reports import collect, report
from polymerge.themes import PALETTES
from report_made import (
    ablation,
    everything,
    knockout,
    plan_of,
    record_of,
    results,
    sampled_search,
    search,
    small_merge,
    write,
)

STATIC = Path(making.__file__).parent / "static"
KINDS = {
    "search.json": search(), "knockout.json": knockout(), "ablation.json": ablation(),
    "results.json": results("m", "m", {"t": [1.0, 0.0]}),
}  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return everything(tmp_path_factory.mktemp("runs"))


def embedded_in(page: str) -> Any:
    """The data that the page holds, as a browser reads it."""
    start = page.index('<script type="application/json" id="data">') + len('<script type="application/json" id="data">')
    return json.loads(page[start : page.index("</script>", start)])


def numbers_of(figure: Any) -> list[dict[str, Any]]:
    """The rows that a chart is made of."""
    (view,) = figure["views"]
    rows: list[dict[str, Any]] = view["spec"]["datasets"][view["spec"]["data"]["name"]]
    return rows


def refusal(*sources: Path, out: Path | None = None) -> str:
    with pytest.raises(Refused) as refused:
        report(sources, out or sources[0].parent / "r.html")
    return str(refused.value)


# --- what is collected


def test_every_kind_of_run_is_shown_and_the_json_beside_the_page_holds_what_the_page_holds(
    runs: list[Path], tmp_path: Path
) -> None:
    made = report(runs, tmp_path / "r.html", "Ours & theirs")
    page = made.page.read_text(encoding="utf-8")
    data = json.loads(made.json.read_text(encoding="utf-8"))
    assert made.json == tmp_path / "r.json"
    embedded = embedded_in(page)
    assert set(embedded.pop("themes")) == {"light", "dark"}
    assert embedded == data == made.data
    assert "<title>Ours &amp; theirs</title>" in page
    assert [one["kind"] for one in data["sources"]] == [
        "merge", "search", "search", "overlap", "scores", "scores", "knockout", "ablation",
    ]  # fmt: skip
    for name, count in {"merges": 1, "searches": 2, "overlaps": 1, "knockouts": 1, "ablations": 1}.items():
        assert len(data[name]) == count
    assert [one["name"] for one in data["scores"]["models"]] == ["vlm", "merged"]
    assert data["advice"]
    assert len(page) < 5_000_000


def test_a_merge_is_told_as_its_record_has_it(runs: list[Path]) -> None:
    (merge,) = collect([runs[0]])["merges"]
    record = json.loads((runs[0] / "polymerge.json").read_text(encoding="utf-8"))
    assert [entry["label"] for entry in merge["inputs"]] == [entry["label"] for entry in record["inputs"]]
    for kind in ("sampled", "sha256"):
        digests = [{file["name"]: file[kind] for file in entry["files"] if file[kind]} for entry in merge["inputs"]]
        assert digests == [entry[kind] for entry in record["inputs"]]
    assert all(entry["sampled"] for entry in record["inputs"])
    assert merge["plan_hash"] == record["plan_hash"]
    assert merge["counts"] == record["output"]["tensors"]
    fates = {row[0]: row[2] for row in merge["plan"]["rows"]}
    assert {name for name, fate in fates.items() if fate == "merged"} == set(record["output"]["merged"])
    assert fates["model.embed_tokens.weight"] == "copied"
    assert merge["plan"]["settings"][0]["words"].startswith("ties (weight 0.5 vlm, 0.5 math; ")
    assert merge["plan"]["settings"][0]["rows"] == len(record["output"]["merged"])
    told = {row[0]: merge["plan"]["reasons"][row[6]] for row in merge["plan"]["rows"]}
    assert told["model.embed_tokens.weight"] == "excluded by the recipe"
    assert {row[1] for row in merge["plan"]["left_out"]} == {"model.embed_tokens.weight"}


def test_gains_are_told_over_the_template_of_the_merge_and_not_over_the_first_model(runs: list[Path]) -> None:
    before, after = runs[3], runs[4]
    known = collect([after, before, runs[0]])["scores"]
    assert (known["template"], known["assumed"]) == ("vlm", False)
    gains = {one["column"]: one["gain"] for one in known["gains"]}
    assert gains == pytest.approx({"read": -10, "sums": 25, "average": 7.5})
    unknown = collect([after, before])["scores"]
    assert (unknown["template"], unknown["assumed"]) == ("merged", True)


def test_what_is_named_twice_is_shown_once_and_folders_of_one_name_are_told_apart(tmp_path: Path) -> None:
    one, other = (write(tmp_path / name / "run" / "search.json", search()) for name in ("a", "b"))
    data = collect([one, one.parent, other])
    assert [found["label"] for found in data["searches"]] == [str(one.parent), str(other.parent)]
    assert [found["label"] for found in collect([one.parent])["searches"]] == ["run"]


def test_a_file_may_have_any_name(tmp_path: Path) -> None:
    data = collect([write(tmp_path / "mine.json", search())])
    assert data["searches"][0]["label"] == "mine"


def test_a_search_by_a_sampler_is_shown_trial_by_trial(tmp_path: Path) -> None:
    (found,) = collect([write(tmp_path / "search.json", sampled_search())])["searches"]
    assert [row["chosen"] for row in found["rows"]] == [False, True, False]
    drawn = numbers_of(found["charts"][0])
    assert [row["value"] for row in drawn if row["series"] == "score"] == [50.0, 62.5, 41.0]
    assert [row["value"] for row in drawn if row["series"] == "best so far"] == [50.0, 62.5, 62.5]


def test_a_grid_of_two_parameters_is_a_heat_map(tmp_path: Path) -> None:
    grid = [[a, b] for a in (0.1, 0.2) for b in (1, 2, 3)]
    data = search(
        vary=["weight", "density"],
        values=grid,
        scores=[1, 2, 3, 4, 5, 6],
        best=grid[5],
        chosen=grid[5],
        chosen_by="exact",
    )
    for name in ("criterion", "candidates", "differences", "minima"):
        del data[name]
    (chart,) = collect([write(tmp_path / "search.json", data)])["searches"][0]["charts"]
    assert [[row["x"], row["y"], row["value"]] for row in numbers_of(chart)] == [
        [0.1, 1, 1], [0.2, 1, 4], [0.1, 2, 2], [0.2, 2, 5], [0.1, 3, 3], [0.2, 3, 6],
    ]  # fmt: skip


def test_maps_of_a_knockout_share_one_scale(runs: list[Path]) -> None:
    maps = [chart for chart in collect([runs[5]])["knockouts"][0]["charts"] if chart["title"].startswith("Drop by")]
    assert len(maps) == 3
    scales = [one["views"][0]["spec"]["layer"][0]["encoding"]["color"]["scale"] for one in maps]
    assert [scale["domain"] for scale in scales] == [[-9.0, 9.0]] * 3


# --- what is refused


def test_everything_that_is_wrong_is_said_at_once(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    files = {
        "broken.json": b'{"vary": 1,\n "values": [}\n',
        "latin.json": b'{"vary":\n "\xe4"}',
        "list.json": b"[1]",
        "nothing.json": b"",
        "twice.json": b'{"vary": 1, "vary": 2}',
        "other.json": b'{"a": 1}',
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    infinite = tmp_path / "infinite.json"
    infinite.write_text(json.dumps(search(differences=[1, float("nan"), 1e999])), encoding="utf-8")
    said = refusal(empty, tmp_path / "gone", *(tmp_path / name for name in files), infinite, out=tmp_path / "r.html")
    for words in (
        "empty: holds none of polymerge.json (polymerge merge), search.json (polymerge search), overlap.json",
        "gone: there is no such folder or file",
        "broken.json: is not JSON: Expecting value at line 2, column 13",
        "latin.json:2: is not UTF-8",
        "list.json: expected object, got array",
        "nothing.json: is not JSON",
        "twice.json: cannot be read: 'vary' appears twice",
        "other.json: is of no known kind",
        "infinite.json: not a finite number at differences[1], differences[2]",
    ):
        assert words in said
    assert not (tmp_path / "r.html").exists()


def test_a_file_of_another_kind_under_a_known_name_is_refused(tmp_path: Path) -> None:
    said = refusal(write(tmp_path / "knockout.json", search()))
    assert "is not what polymerge knockout writes: it lacks baseline, cells, replace, summary" in said


@pytest.mark.parametrize(
    ("file", "change", "words"),
    [
        ("search.json", {"differences": [1, 2]}, "differences has 2 numbers for 3"),
        ("search.json", {"scores": [1, 2, "3", 4, 5]}, 'scores[2]: expected int | float, got "3"'),
        ("search.json", {"scores": [1]}, "scores has 1 numbers for 5"),
        ("search.json", {"values": []}, "values: expected array of length >= 1"),
        ("search.json", {"values": [0, [1, 2], 3, 4, 5]}, "values[1] is no value of weight"),
        ("search.json", {"minima": None}, "minima is missing"),
        ("search.json", {"prompts": -1}, "prompts: expected int >= 0"),
        ("search.json", {"prompts": True}, "prompts: expected int | null, got true"),
        ("knockout.json", {"cells": [{"task": "read"}]}, "cells[0].layers is missing"),
        ("knockout.json", {"cells": {}}, "cells: expected array, got object"),
        ("knockout.json", {"baseline": {}}, "baseline.model['read'] is missing"),
        ("knockout.json", {"modules": ["attention"]}, "which it does not list"),
        ("ablation.json", {"ranges": [{"name": "early", "layers": [0], "tasks": {}}]}, "tasks['sums'] is missing"),
        ("ablation.json", {"depth": "3"}, 'depth: expected int, got "3"'),
        ("results.json", {"version": 2}, "is of version 2 of the format, this polymerge reads 1"),
        ("results.json", {"tasks": {"t": {"score": "1"}}}, "tasks['t'].score: expected float | null, got"),
    ],
)
def test_a_field_that_is_broken_is_named_with_its_place(
    file: str, change: dict[str, Any], words: str, tmp_path: Path
) -> None:
    path = write(tmp_path / file, {**KINDS[file], **change})
    said = refusal(path)
    assert words in said
    assert str(path) in said


@pytest.mark.parametrize(
    ("break_it", "words"),
    [
        (lambda record: record["plan"].update(version=9), "plan has version 9, this polymerge reads 1"),
        (lambda record: record["plan"]["steps"][1].append(1), "steps[1] has 8 cells for 7 columns"),
        (lambda record: record["plan"]["steps"][0].__setitem__(5, 7), "steps[0]: setting 7 is none of the plan's 1"),
        (lambda record: record["plan"]["settings"][0].update(models=["one"]), "parameters do not fit the models one"),
        (lambda record: record["output"].pop("files"), "output.files is missing"),
        (lambda record: record.update(inputs=[1]), "inputs[0]: expected object, got 1"),
        (lambda record: record["inputs"][0].update(role="base"), 'inputs[0].role: expected array, got "base"'),
    ],
)
def test_a_broken_record_of_a_merge_is_refused(
    break_it: Callable[[Any], Any], words: str, runs: list[Path], tmp_path: Path
) -> None:
    record = json.loads((runs[0] / "polymerge.json").read_text(encoding="utf-8"))
    break_it(record)
    assert words in refusal(write(tmp_path / "polymerge.json", record))


def test_broken_rows_of_an_overlap_are_refused(runs: list[Path], tmp_path: Path) -> None:
    data = json.loads((runs[0] / "overlap.json").read_text(encoding="utf-8"))
    data["places"][0]["pairs"][0]["cosine"] = "much"
    del data["tensors"][2]["deltas"]
    data["totals"] = []
    said = refusal(write(tmp_path / "overlap.json", data))
    for words in ("places[0].pairs[0].cosine: expected", "tensors[2].deltas is missing", "totals: expected array of"):
        assert words in said


def test_two_results_of_one_model_and_task_are_refused(tmp_path: Path) -> None:
    files = [write(tmp_path / name / "results.json", KINDS["results.json"]) for name in "ab"]
    assert "two results of the model 'm' have t" in refusal(*files)


def test_a_record_of_before_there_were_plans_in_it_is_shown_without(runs: list[Path], tmp_path: Path) -> None:
    record = json.loads((runs[0] / "polymerge.json").read_text(encoding="utf-8"))
    del record["plan"]
    assert collect([write(tmp_path / "polymerge.json", record)])["merges"][0]["plan"] is None


def test_only_a_report_is_replaced(tmp_path: Path) -> None:
    source = write(tmp_path / "search.json", search())
    first = report([source], tmp_path / "r.html", "first")
    assert "second" in report([source], tmp_path / "r.html", "second").json.read_text(encoding="utf-8")
    precious = tmp_path / "notes.html"
    precious.write_text("mine")
    said = refusal(source, out=precious)
    assert "notes.html: exists and is no report" in said
    assert precious.read_text() == "mine"
    assert "search.json: exists and is no report" in refusal(source, out=tmp_path / "search.html")
    assert json.loads(source.read_text(encoding="utf-8")) == search()
    assert "there is no folder" in refusal(source, out=tmp_path / "gone" / "r.html")
    assert "is a folder" in refusal(source, out=tmp_path)
    assert "would be the same file" in refusal(source, out=tmp_path / "page.json")
    assert first.page.exists()
    assert not list(tmp_path.glob(".*"))


def test_no_run_at_all_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="no run to show"):
        report([], tmp_path / "r.html")


# --- the plan in polymerge.json


def test_the_plan_of_seven_billion_parameters_takes_little_of_its_record() -> None:
    plan = plan_of(32)
    assert len(plan.steps) > 600
    text = provenance(plan, {}, ["polymerge"], {})
    assert len(text.encode()) < 300_000
    record = json.loads(text)
    assert record["plan"] == json.loads(json.dumps(plan_table(plan)))
    assert max(map(len, text.splitlines())) < 400


def test_a_row_says_what_became_of_a_tensor() -> None:
    table = plan_table(plan_of(1))
    first = dict(zip(table["columns"]["steps"], table["steps"][0], strict=True))
    assert first == {
        "name": "language_model.model.layers.0.self_attn.q_proj.weight", "fate": "merged", "dtype": "BF16",
        "canonical": "text.layers.0.self_attn.q_proj.weight", "shape": [4096, 4096], "setting": 0, "reason": "",
    }  # fmt: skip
    assert table["steps"][-1][2:] == ["tied", "BF16", [9, 9], None, "same as embed.weight"]
    assert table["left_out"] == [["math", "lm_head.weight", "its vocabulary differs"]]
    assert table["settings"][0]["models"] == ["vlm", "math"]
    assert table["warnings"] == ["the vocabularies differ"]


def test_a_tensor_whose_blocks_are_merged_by_several_settings_names_them_all() -> None:
    plan = plan_of(1)
    step = plan.steps[0]
    both = (*step.pieces, Piece("b", ((0, 1),), 1), Piece("c", ((0, 1),)))
    plan = Plan(**{**vars(plan), "settings": plan.settings * 2, "steps": (Step(**{**vars(step), "pieces": both}),)})
    assert plan_table(plan)["steps"][0][5] == [0, 1]


def test_an_empty_list_of_a_plan_is_still_json() -> None:
    plan = Plan(**{**vars(plan_of(0)), "left_out": (), "warnings": (), "steps": ()})
    assert json.loads(provenance(plan, {}, [], {}))["plan"]["steps"] == []


# --- the page


class Elements(HTMLParser):
    """The elements of a page with their attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)><!--\u2028{{style}}"


def test_texts_of_a_run_cannot_leave_the_data(tmp_path: Path) -> None:
    data = search(vary=HOSTILE, chosen_by=HOSTILE, criterion=HOSTILE)
    made = report([write(tmp_path / "search.json", data)], tmp_path / "r.html", HOSTILE)
    page = made.page.read_text(encoding="utf-8")
    assert embedded_in(page)["searches"][0]["vary"] == [HOSTILE]
    elements = Elements()
    elements.feed(page)
    assert sum(tag == "script" for tag, _ in elements.found) == 3  # the data, Vega, and ours
    assert not any(tag == "img" for tag, _ in elements.found)
    assert "<img" not in page.replace(vega(), "")
    assert "</script><script>alert" not in page


def test_a_page_asks_nobody_for_anything(runs: list[Path]) -> None:
    page = make_page(collect(runs))
    elements = Elements()
    elements.feed(page)
    for tag, attributes in elements.found:
        assert "src" not in attributes, tag
        assert not attributes.get("href") or str(attributes["href"]).startswith(("#", "data:,"))
    style = (STATIC / "style.css").read_text(encoding="utf-8")
    assert not re.search(r"@import|url\(", style)
    script = "".join(file.read_text(encoding="utf-8") for file in STATIC.glob("*.js"))
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|fetch\(", script)
    assert not re.search(r"XMLHttp|import\(|https?:(?!//www\.w3\.org/2000/svg)", script)
    (policy,) = [one["content"] for tag, one in elements.found if one.get("http-equiv") == "Content-Security-Policy"]
    assert str(policy).startswith("default-src 'none';")
    assert "script-src 'sha256-" in str(policy)


def luminance(colour: str) -> float:
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    lit = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * lit[0] + 0.7152 * lit[1] + 0.0722 * lit[2]


def contrast(one: str, other: str) -> float:
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_colours_can_be_read_in_both_themes(theme: str) -> None:
    found = PALETTES[theme]
    for ink in ("ink", "soft", "accent"):
        for ground in ("paper", "panel"):
            assert contrast(found[ink], found[ground]) >= 4.5, (ink, ground)
    for place in range(1, 7):
        assert contrast(found[f"series-{place}"], found["paper"]) >= 3, place
    for ink, ground in (("heat-on-low", "heat-low"), ("heat-on-high", "heat-high"), ("tip-ink", "tip")):
        assert contrast(found[ink], found[ground]) >= 4.5, ink
    assert contrast(found["heat-on-high"], found["heat-negative"]) >= 4.5


def test_the_dark_theme_is_the_same_by_the_switch_and_by_the_system(runs: list[Path]) -> None:
    page = make_page(collect(runs[1:2]))
    dark = " ".join(f"--{name}: {colour};" for name, colour in PALETTES["dark"].items())
    assert page.count(dark) == 2
    assert PALETTES["dark"].keys() == PALETTES["light"].keys()


def test_without_altair_a_report_says_what_to_install(
    runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(charts, "find_spec", lambda name: None if name == "altair" else name)
    with pytest.raises(MissingExtraError, match=r"altair and vl-convert-python: pip install 'polymerge\[report\]'"):
        report(runs, tmp_path / "r.html")
    assert not list(tmp_path.iterdir())


# --- its size


def test_a_plan_of_ten_thousand_tensors_fits_whole(tmp_path: Path) -> None:
    plan = plan_of(1110)
    assert len(plan.steps) > 10_000
    made = report([write(tmp_path / "polymerge.json", record_of(plan))], tmp_path / "r.html")
    assert made.page.stat().st_size < 5_000_000
    assert len(made.data["merges"][0]["plan"]["rows"]) == len(plan.steps)


def test_what_does_not_fit_is_shortened_and_says_so(
    runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of(200)
    sources = [write(tmp_path / "polymerge.json", record_of(plan)), runs[0] / "overlap.json"]
    monkeypatch.setattr(making, "MOST_BYTES", 60_000)
    monkeypatch.setattr(making, "MOST_TENSORS", 2)
    made = report(sources, tmp_path / "r.html")
    told = made.data["merges"][0]["plan"]
    assert told["by_kind"]
    assert sum(row[7] for row in told["rows"]) == len(plan.steps) == told["shown"]
    assert len(told["rows"]) < 40
    overlap = made.data["overlaps"][0]
    assert len(overlap["tensors"]) == 2 < overlap["tensors_all"]
    assert overlap["tensors"][0][4] >= overlap["tensors"][1][4]
    monkeypatch.setattr(making, "MOST_BYTES", 1000)
    with pytest.raises(PolymergeError, match="show fewer runs on one page"):
        report(sources, tmp_path / "r.html")


# --- the command


def test_the_command_says_what_it_made(runs: list[Path], tmp_path: Path) -> None:
    done = CliRunner().invoke(
        report_command,
        [*map(str, runs[:2]), "-o", str(tmp_path / "p.html"), "--title", "T", "--json", str(tmp_path / "n.json")],
        catch_exceptions=False,
    )
    assert done.exit_code == 0
    assert f"{tmp_path / 'p.html'}: merge merged, search search, overlap merged (9" in done.output
    assert json.loads((tmp_path / "n.json").read_text(encoding="utf-8"))["title"] == "T"


def test_the_title_names_the_models_and_the_method(tmp_path: Path) -> None:
    merged = small_merge(tmp_path)
    assert collect([merged])["title"] == "vlm and math, merged by ties"


def test_records_that_lack_what_a_chart_needs(tmp_path: Path) -> None:
    file = write(tmp_path / "search.json", search(chosen=None))
    with pytest.raises(Refused, match=r"search\.json: chosen is missing"):
        collect([file])
    told = knockout()
    del told["cells"][0]["difference"]["interval"], told["cells"][1]["model"]["interval"]
    assert collect([write(tmp_path / "knockout.json", told)])["knockouts"][0]["charts"]
    for number in (1e301, float("nan"), -float("inf")):
        told["cells"][0]["model"]["drop"] = number
        with pytest.raises(Refused, match=r"not a finite number at cells\[0\]\.model\.drop"):
            collect([write(tmp_path / "knockout.json", told)])
