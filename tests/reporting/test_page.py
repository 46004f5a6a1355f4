"""The page in a real browser, from a file: quiet, complete, sortable, readable in both themes and on a phone."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from polymerge.analysis.overlap import overlap
from polymerge.reporting.reports import Report, report
from polymerge.themes import PALETTES
from report_made import everything, knockout, plan_of, record_of, results, search, small_merge, write

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)
if BROWSER is None:
    pytest.skip(f"no Chromium found under any of {', '.join(NAMES)}", allow_module_level=True)
sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")

OPTIONS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update",
]  # fmt: skip
DESK, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}


@dataclass
class Opened:
    """A page and everything that it should not have done."""

    page: Any
    noise: list[str] = field(default_factory=list)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as play:
        chromium = play.chromium.launch(executable_path=BROWSER, args=OPTIONS)
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Report:
    folder = tmp_path_factory.mktemp("made")
    return report(everything(folder), folder / "report.html")


def opened(browser: Any, file: Path, size: dict[str, int] = DESK, scheme: str = "light") -> Opened:
    """The page in a window of its own; what it says on the console, fails at or asks the network for is noted."""
    page = browser.new_context(viewport=size, color_scheme=scheme, reduced_motion="reduce").new_page()
    found = Opened(page)
    page.on("console", lambda message: found.noise.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: found.noise.append(f"error: {error}"))
    page.on(
        "request", lambda asked: found.noise.append(f"asked for {asked.url}") if asked.url != file.as_uri() else None
    )
    page.goto(file.as_uri())
    page.wait_for_selector("#next")
    page.wait_for_function("[...document.querySelectorAll('.plot')].every((one) => one.querySelector('svg[role=img]'))")
    return found


@pytest.fixture
def desk(browser: Any, made: Report) -> Iterator[Any]:
    """The whole report on a desk; whatever a test does there, the page stays quiet."""
    found = opened(browser, made.page)
    yield found.page
    assert found.noise == []
    found.page.context.close()


def column(page: Any, table: str, place: int) -> list[str]:
    cells: list[str] = page.locator(f'[aria-label="{table}"] tbody tr > :nth-child({place})').all_inner_texts()
    return cells


def test_every_section_is_there_with_its_plots(desk: Any) -> None:
    ids = [one.get_attribute("id") for one in desk.locator("main > section").all()]
    assert ids == ["merges", "plan", "overlap", "search", "scores", "knockout", "ablation", "next"]
    for section, plots in {"overlap": 2, "search": 3, "scores": 2, "knockout": 5, "ablation": 1}.items():
        drawn = desk.locator(f"#{section} .plot svg[role=img]")
        assert drawn.count() == plots, section
        for one in drawn.all():
            assert one.get_attribute("aria-label")
            assert one.locator("path, rect, circle").count() > 1


def test_a_table_is_sorted_by_its_heads_numbers_as_numbers(desk: Any) -> None:
    table = "Plan of merged"
    head = desk.locator(f'[aria-label="{table}"] th').nth(0)
    head.locator("button").click()
    names = [cell.split("\n")[0] for cell in column(desk, table, 1)]
    assert head.get_attribute("aria-sort") == "ascending"
    assert names == sorted(names)
    head.locator("button").click()
    assert head.get_attribute("aria-sort") == "descending"
    assert [cell.split("\n")[0] for cell in column(desk, table, 1)] == names[::-1]
    desk.locator('[aria-label="Values of search"] th button', has_text="score").click()
    assert column(desk, "Values of search", 3) == ["60.5", "55", "51.25", "40.5", "20.75"]
    desk.locator('[aria-label="Values of search"] th button', has_text="difference").click()
    assert column(desk, "Values of search", 2) == ["40", "31", "12", "-", "-"]
    desk.locator('[aria-label="Values of search"] th button', has_text="difference").press("Enter")
    assert column(desk, "Values of search", 2) == ["12", "31", "40", "-", "-"]


def test_a_table_is_filtered_by_words_and_by_fate(desk: Any) -> None:
    plan = desk.locator("#plan")
    plan.locator("input").fill("MLP layers.1")
    assert [cell.split("\n")[0] for cell in column(desk, "Plan of merged", 1)] == ["model.layers.1.mlp.up_proj.weight"]
    assert plan.locator("[role=status]").inner_text() == "1 of 5 rows"
    plan.locator("input").fill("nothing of this name")
    assert "No row has all of these words" in plan.inner_text()
    plan.locator("input").fill("")
    plan.locator("select").select_option("copied")
    assert column(desk, "Plan of merged", 2) == ["copied"]


def test_a_plot_tells_its_numbers_where_it_is_pointed_at(desk: Any) -> None:
    tip = desk.locator("#tip")
    assert tip.is_hidden()
    for section in ("overlap", "search", "scores", "knockout", "ablation"):
        for plot in desk.locator(f"#{section} .plot").all():
            places = plot.locator(".mark-rect.role-mark").last.locator("path")
            middle = places.nth(places.count() // 2)
            middle.scroll_into_view_if_needed()
            desk.evaluate("new Promise((then) => requestAnimationFrame(() => requestAnimationFrame(then)))")
            middle.hover()
            tip.wait_for(state="visible")
            assert re.search(r": -?\d", tip.inner_text()), plot.get_attribute("aria-label")
            inside = tip.bounding_box()
            assert inside["x"] >= 0
            assert inside["x"] + inside["width"] <= DESK["width"]
    desk.mouse.move(2, 2)
    tip.wait_for(state="hidden")


def test_a_plot_tells_its_numbers_to_who_walks_through_it_by_keys(desk: Any) -> None:
    plot = desk.locator("#search .plot").first
    assert plot.get_attribute("aria-label") == "How much answers change. Arrow keys walk through its numbers."
    plot.focus()
    plot.press("ArrowRight")
    plot.press("ArrowRight")
    plot.press("ArrowRight")
    assert desk.locator("#aloud").inner_text() == "weight 0.4; difference: 12; chosen"
    assert desk.locator("#tip").is_visible()
    plot.press("Escape")
    assert desk.locator("#tip").is_hidden()


def test_a_plot_says_what_it_shows_to_who_does_not_see_it(desk: Any) -> None:
    for one in desk.locator(".plot svg[role=img]").all():
        said = one.get_attribute("aria-label")
        assert re.search(r"[0-9]+ numbers?, (each -?[0-9]|from -?[0-9.e+-]+ \(.+\) to -?[0-9])", said), said
    said = desk.locator("#search .plot svg[role=img]").first.get_attribute("aria-label")
    rows = desk.locator("#search table tbody tr").count()
    assert rows
    assert "from " in said


def test_everything_that_can_be_used_is_reached_by_keys_and_has_a_name(desk: Any) -> None:
    named = """(one) => one.getAttribute("aria-label") || one.textContent.trim() || one.placeholder"""
    for one in desk.locator("a, button, input, select, summary, [tabindex='0']").all():
        assert one.evaluate(named), one.evaluate("(one) => one.outerHTML.slice(0, 200)")
        assert one.evaluate("(one) => one.tabIndex") == 0
    desk.keyboard.press("Tab")
    assert desk.evaluate("document.activeElement.className") == "skip"
    assert desk.evaluate("document.activeElement.getBoundingClientRect().left") > 0  # seen where it is reached
    desk.keyboard.press("Tab")
    assert desk.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    scrolled = """[...document.querySelectorAll("*")].filter((one) => one.scrollHeight > one.clientHeight + 1
        && ["auto", "scroll"].includes(getComputedStyle(one).overflowY) && one.tabIndex !== 0)
        .map((one) => one.className)"""
    assert desk.evaluate(scrolled) == []
    levels = desk.evaluate("[...document.querySelectorAll('h1, h2, h3, h4')].map((one) => Number(one.tagName[1]))")
    assert levels[0] == 1
    assert levels.count(1) == 1


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_paper_it_is_light_whole_and_without_controls(browser: Any, made: Report, scheme: str) -> None:
    found = opened(browser, made.page, scheme=scheme)
    page = found.page
    page.emulate_media(media="print", color_scheme=scheme)
    page.evaluate("window.dispatchEvent(new Event('beforeprint'))")
    look = "(name) => getComputedStyle(document.querySelector(name))"
    assert page.evaluate(f"({look})('body').backgroundColor") == "rgb(252, 252, 250)"
    for name in (".sections", ".themes", ".tools"):
        assert page.evaluate(f"({look})('{name}').display") == "none"
    cut = """[...document.querySelectorAll(".table, pre")].filter((one) => getComputedStyle(one).maxHeight !== "none"
        || one.scrollHeight > one.clientHeight + 2).length"""
    assert page.evaluate(cut) == 0
    turned = page.evaluate(f"({look})('.plot svg').filter")
    assert (turned == "none") == (scheme == "light")
    plan = json.loads(made.json.read_text(encoding="utf-8"))["merges"][0]["plan"]["rows"]
    assert page.locator("#plan table").first.locator("tbody tr").count() == min(len(plan), 400)
    assert len(page.pdf()) > 10_000
    assert found.noise == []
    page.context.close()


def test_a_heat_map_changes_its_measure(desk: Any) -> None:
    figure = desk.locator("#overlap figure").first
    cell = figure.locator(".mark-rect.role-mark path").first
    before = cell.get_attribute("fill")
    figure.locator("select").select_option(label="cosine")
    assert "of the deltas as vectors" in figure.inner_text()
    figure.locator(".role-legend text", has_text=re.compile("^cosine$")).wait_for()
    assert cell.get_attribute("fill") != before
    ends = [stop.get_attribute("stop-color") for stop in figure.locator("linearGradient stop").all()]
    assert len(ends) > 2
    assert ends[0] != ends[len(ends) // 2] != ends[-1] != ends[0]


def test_the_theme_follows_the_system_until_it_is_switched(browser: Any, made: Report) -> None:
    found = opened(browser, made.page, scheme="dark")
    ground = "getComputedStyle(document.body).backgroundColor"

    def label_of(theme: str) -> Any:
        return found.page.locator(f'.plot .role-axis-label text[fill="{PALETTES[theme]["soft"]}"]').first

    assert found.page.evaluate(ground) == "rgb(21, 23, 27)"
    label_of("dark").wait_for()
    found.page.get_by_role("button", name="Light").click()
    assert found.page.evaluate(ground) == "rgb(252, 252, 250)"
    label_of("light").wait_for()
    assert label_of("dark").count() == 0
    found.page.reload()
    assert found.page.evaluate(ground) == "rgb(252, 252, 250)"
    assert found.page.get_by_role("button", name="Light").get_attribute("aria-pressed") == "true"
    found.page.get_by_role("button", name="Auto").click()
    assert found.page.evaluate(ground) == "rgb(21, 23, 27)"
    assert found.noise == []


def test_a_phone_never_scrolls_sideways(browser: Any, made: Report) -> None:
    found = opened(browser, made.page, PHONE)
    for details in found.page.locator("summary").all():
        details.click()
    assert found.page.evaluate("document.documentElement.scrollWidth") == PHONE["width"]
    drawn = found.page.locator(".plot svg").all()
    assert drawn
    for plot in drawn:
        assert plot.bounding_box()["width"] <= PHONE["width"]
        for text in plot.locator("text").all():
            box = text.bounding_box()
            assert box is None or box["x"] + box["width"] <= PHONE["width"], text.inner_html()
    assert found.noise == []


def test_a_plan_of_ten_thousand_tensors_is_made_as_it_comes_into_sight(browser: Any, tmp_path: Path) -> None:
    plan = plan_of(1110)
    found = opened(browser, report([write(tmp_path / "polymerge.json", record_of(plan))], tmp_path / "r.html").page)
    rows = found.page.locator('[aria-label^="Plan of"] tbody tr')
    first = rows.count()
    assert first < 200
    found.page.locator('[aria-label^="Plan of"]').evaluate("node => node.scrollTo(0, node.scrollHeight)")
    rows.nth(first).wait_for(state="attached")
    found.page.locator("#plan input").fill("layers.1109.mlp.down_proj")
    assert rows.count() == 1
    assert found.page.locator("#plan [role=status]").inner_text() == f"1 of {len(plan.steps):,} rows"
    assert found.noise == []


def test_texts_of_a_run_are_shown_as_they_are_and_run_nothing(browser: Any, tmp_path: Path) -> None:
    hostile = "</script><img src=x onerror=document.title='gone'><b>bold</b>"
    data = search(vary=hostile, chosen_by=hostile, criterion=hostile)
    made = report([write(tmp_path / "search.json", data)], tmp_path / "r.html", hostile)
    found = opened(browser, made.page)
    assert found.page.title() == hostile
    assert found.page.locator("h1").inner_text() == hostile
    assert found.page.locator("main img, main b, main script").count() == 0
    assert found.noise == []


def test_runs_that_measured_little_are_shown_as_well(browser: Any, tmp_path: Path) -> None:
    """One model, one delta, one task, no original, no intervals, a grid over words, a record without a plan."""
    merged = small_merge(tmp_path)
    record = json.loads((merged / "polymerge.json").read_text(encoding="utf-8"))
    del record["plan"]
    alone = {**record["recipe"], "models": record["recipe"]["models"][:1], "parameters": {"weight": 1.0}}
    alone["template"] = alone["models"][0]["model"]
    bare = knockout()
    bare["against"] = None
    for cell in bare["cells"]:
        cell["model"]["interval"] = None
    words = search(
        vary="method", values=["ties", "linear"], scores=[1.0, 2.0], best="linear", chosen="linear", chosen_by="exact"
    )
    for name in ("criterion", "candidates", "differences", "minima"):
        del words[name]
    made = report(
        [
            write(tmp_path / "polymerge.json", record),
            write(tmp_path / "overlap.json", overlap(alone).to_json()),
            write(tmp_path / "knockout.json", bare),
            write(tmp_path / "search.json", words),
            write(tmp_path / "results.json", results("m", "m", {"t": [1.0, 0.0]})),
        ],
        tmp_path / "r.html",
    )
    for size in (DESK, PHONE):
        found = opened(browser, made.page, size)
        assert found.page.locator("main > section").count() == 7
        assert "written without its plan" in found.page.locator("#plan").inner_text()
        for details in found.page.locator("summary").all():
            details.click()
        assert found.page.evaluate("document.documentElement.scrollWidth") == size["width"]
        assert "NaN" not in found.page.locator("main").inner_html()
        assert "undefined" not in found.page.locator("main").inner_text()
        assert found.noise == []


NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?")
UNIT = {"GB": 1e9, "MB": 1e6, "kB": 1e3}


def known_numbers(data: Any) -> tuple[set[float], set[str]]:
    """Every number in JSON data, how long its lists are, and what its texts hold of numbers."""
    numbers: set[float] = set()
    texts: set[str] = set()
    waiting = [data]
    while waiting:
        one = waiting.pop()
        if isinstance(one, str):
            texts |= set(NUMBER.findall(one))
        elif isinstance(one, int | float):
            numbers.add(abs(float(one)))
        elif one is not None:
            numbers.add(len(one))
            waiting += [*one, *one.values()] if isinstance(one, dict) else one
    return numbers, texts


def is_rounding(shown: str, of: set[float]) -> bool:
    """Whether a number as it is shown is one of these, rounded to the digits that are shown."""
    value = float(shown.replace(",", ""))
    mantissa, _, exponent = shown.partition("e")
    digits = len(mantissa.partition(".")[2]) - int(exponent or 0)
    return any(abs(value - one) <= 0.5000001 * 10**-digits for one in of)


def test_every_number_on_the_page_is_in_the_json_beside_it(browser: Any, made: Report) -> None:
    found = opened(browser, made.page)
    for details in found.page.locator("summary").all():
        details.click()
    # the round numbers of axes and legends are no results
    texts: list[str] = found.page.evaluate(
        """() => {
            const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
            const found = [];
            while (walker.nextNode()) {
                const around = walker.currentNode.parentElement;
                const hidden = "script, style, noscript, [aria-hidden=true], .role-axis, .role-legend";
                if (!around.closest(hidden)) found.push(walker.currentNode.data);
            }
            return found;
        }"""
    )
    numbers, words = known_numbers(json.loads(made.json.read_text(encoding="utf-8")))
    shown = 0
    for text in texts:
        for match in NUMBER.finditer(text):
            number, unit = match[0], text[match.end() :].strip()[:2]
            scaled = {one / UNIT[unit] for one in numbers} if unit in UNIT else numbers
            assert number in words or is_rounding(number, scaled), (number, text)
            shown += 1
    assert shown > 400
