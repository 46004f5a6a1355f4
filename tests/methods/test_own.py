"""Methods of the user's own: rows of a file or a package, what is refused of them, and where their code is recorded."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import polymerge
from polymerge.errors import PolymergeError, RecipeError, Refused
from polymerge.inference.job import Job
from polymerge.inference.worker import Worker
from polymerge.methods import own, table
from polymerge.methods.own import MethodsFile, add_methods, find_method, installed
from polymerge.methods.table import METHODS
from running import checkpoint, cli, merged, raw, recipe_file, small_llama
from search_made import done, outcome, prompts_file, recipe, refused, words
from tiny import load

HALVED = """
from polymerge import Method, Parameter
from polymerge.methods.kernels import weighted_sum

def halved(deltas, weight):
    return weighted_sum(deltas, [one / 2 for one in weight])

HALVED = Method(
    "halved", "half a sum", "nowhere", "deltas", halved, parameters=(Parameter("weight", "number", each=True),)
)
"""


@pytest.fixture(autouse=True)
def forgotten(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing that a test adds is there afterwards."""
    rows = dict(table._TABLE)
    monkeypatch.setattr(own, "_OWN", {})
    yield
    table._TABLE.clear()
    table._TABLE.update(rows)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("models")
    return [str(checkpoint(folder / name, small_llama(seed))) for seed, name in enumerate(("base", "a", "b"))]


def asked(models: list[str], method: str, weight: float) -> dict[str, Any]:
    base, *tuned = models
    return {
        "merge_method": method,
        "base_model": base,
        "models": [{"model": one, "parameters": {"weight": weight}} for one in tuned],
    }


def written(folder: Path, text: str = HALVED, name: str = "mine.py") -> Path:
    file = folder / name
    file.write_text(text)
    return file


def test_a_file_of_methods_merges_by_command_line_and_in_python(models: list[str], tmp_path: Path) -> None:
    file, wanted = written(tmp_path), asked(models, "halved", 0.8)
    with pytest.raises(Refused, match="there is no method 'halved'"):
        polymerge.plan(wanted)
    out = merged(wanted, tmp_path / "out", "--no-verify", "--methods", file)
    assert raw(out) == raw(merged(asked(models, "task_arithmetic", 0.4), tmp_path / "same", "--no-verify"))
    again = polymerge.merge(wanted, tmp_path / "again", methods=file, check=False)
    assert raw(again.folder) == raw(out)
    digest = MethodsFile.read(file).sha256
    for folder in (out, again.folder):
        record = json.loads((folder / "polymerge.json").read_text())
        assert record["methods"] == {"halved": {"origin": f"sha256 {digest}", "file": file.name}}
    assert "methods" not in json.loads((tmp_path / "same" / "polymerge.json").read_text())
    said = cli("plan", recipe_file(wanted, tmp_path / "recipe.yaml"), "--methods", file)
    assert said.status == 0, said.err
    assert f"halved is a method of your own: sha256 {digest}\n" in said.out


def test_a_function_of_whole_matrices_is_given_them(models: list[str], tmp_path: Path) -> None:
    file = written(
        tmp_path,
        """
from polymerge import Method, Parameter

def mean_of_matrices(deltas):
    assert deltas.shape == (2, 9, 6)
    return deltas.mean(axis=0)

MEAN = Method("mean_of_matrices", "a mean", "nowhere", "matrices", mean_of_matrices, decomposes=(0, 1),
              parameters=(Parameter("scale", "number", 1.0),))
""",
    )
    wanted = asked(models, "mean_of_matrices", 1)
    for entry in wanted["models"]:
        del entry["parameters"]
    out = polymerge.merge(wanted, tmp_path / "out", methods=file, check=False).folder
    mean = polymerge.merge(asked(models, "task_arithmetic", 0.5), tmp_path / "mean", check=False).folder
    ours, theirs = load(out), load(mean)
    for name, held in theirs.items():
        assert torch.allclose(ours[name].float(), held.float(), atol=2e-2), name


def test_polymerge_methods_lists_a_file_s(tmp_path: Path) -> None:
    assert "halved: half a sum" in cli("methods", written(tmp_path)).out
    assert json.loads(cli("methods", written(tmp_path), "--json").out)["halved"]["source"] == "nowhere"


def test_a_written_plan_knows_the_text_that_it_was_made_with(models: list[str], tmp_path: Path) -> None:
    file, wanted = written(tmp_path), asked(models, "halved", 0.8)
    plan = polymerge.plan(wanted, methods=file)
    assert plan.hash != polymerge.plan(asked(models, "task_arithmetic", 0.4)).hash
    data = json.loads(json.dumps(plan.to_json()))
    assert polymerge.plan(data).hash == plan.hash
    ours = polymerge.merge(data, tmp_path / "out", check=False).folder
    add_methods(written(tmp_path, HALVED.replace("one / 2", "one / 4")))
    for stale in (plan, data):
        with pytest.raises(RecipeError, match=r"planned with another 'halved': sha256 \w+, and there is sha256 \w+"):
            polymerge.merge(stale, tmp_path / "stale", check=False)
    theirs = polymerge.merge(wanted, tmp_path / "other", methods=[file], check=False).folder
    assert raw(theirs) != raw(ours)
    table.register("halved", None)
    own._OWN.clear()
    with pytest.raises(RecipeError, match=r"of the user's own \(sha256 \w+\), which is not there. Give its file"):
        polymerge.plan(data)
    plan_file = tmp_path / "plan.json"
    plan_file.write_text(json.dumps(data))
    ran = cli("merge", plan_file, "-o", tmp_path / "none")
    assert (ran.status, "Give its file as `--methods`" in ran.err) == (2, True)
    written(tmp_path)
    done = cli("merge", plan_file, "--methods", file, "-o", tmp_path / "done", "--no-verify")
    assert done.status == 0, done.err
    assert raw(tmp_path / "done") == raw(ours)


def test_each_stage_knows_its_own(models: list[str], tmp_path: Path) -> None:
    file, first = written(tmp_path), {"name": "first", **asked(models, "halved", 0.8)}
    stages = {
        "stages": [first, {"merge_method": "linear", "models": ["first", models[1]], "parameters": {"weight": 1}}]
    }
    plan = polymerge.plan(stages, methods=file)
    origin = f"sha256 {MethodsFile.read(file).sha256}"
    assert ([one.methods for one in plan.stages], plan.methods) == ([{"halved": origin}], {})
    out = polymerge.merge(json.loads(json.dumps(plan.to_json())), tmp_path / "out", check=False).folder
    assert origin in (out / "polymerge.json").read_text()
    add_methods(written(tmp_path, HALVED + "#"))
    for stale in (plan, plan.to_json()):
        with pytest.raises(RecipeError, match="was planned with another 'halved'"):
            polymerge.plan(stale)


def test_a_plan_never_runs_a_file_that_it_names(models: list[str], tmp_path: Path) -> None:
    file = written(tmp_path, HALVED + f"\nwith open({str(tmp_path / 'ran')!r}, 'a') as ran: ran.write('x')\n")
    data = polymerge.plan(asked(models, "halved", 1), methods=file).to_json()
    assert (tmp_path / "ran").read_text() == "x"
    add_methods(file)  # the same text is not run again
    table.register("halved", None)
    own._OWN.clear()
    with pytest.raises(RecipeError, match="which is not there"):
        polymerge.plan(json.loads(json.dumps(data)))
    assert (tmp_path / "ran").read_text() == "x"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1 / 0", r"mine.py: does not run: ZeroDivisionError: division by zero"),
        ("def halved(:", r"mine.py: does not run: SyntaxError"),
        ("import nothing_of_this_name", r"mine.py: does not run: ModuleNotFoundError: No module named"),
        ("x = 1", r"mine.py: has no row of a method. Give a name of it a polymerge.Method"),
        ("from polymerge import METHODS\nties = METHODS['ties']", r"mine.py: has no row of a method"),
        (HALVED.replace('"halved"', '"ties"'), r"ties: the name is taken by a method of polymerge. Choose another"),
        (HALVED.replace('"halved"', '"half it"'), r"half it: the name of a method has to be a word of letters"),
        (
            HALVED.replace("(deltas, weight)", "(deltas)"),
            r"halved: its function has no parameter 'weight'",
        ),
        (HALVED.replace("(deltas, weight)", "()"), r"halved: its function takes nothing"),
        (
            HALVED.replace("(deltas, weight)", "(deltas, weight, wieght)"),
            r"halved: its function needs 'wieght', which the row does not say. Did you mean 'weight'\?",
        ),
        (
            HALVED.replace("each=True),)\n", "each=True),), random=True\n"),
            r"halved: its function has no parameter 'keys', which the row says",
        ),
        (
            HALVED.replace("each=True),)\n", "each=True),), statistic='cutoff'\n"),
            r"cutoff follows from `density`",
        ),
        (HALVED.replace('"deltas", halved', '"delta", halved'), r"halved: on cannot be 'delta', only weights, deltas"),
        (HALVED.replace('"deltas", halved', '"nothing", halved'), r"halved: a method of one's own has to merge"),
        (
            HALVED.replace('"deltas", halved', '"deltas", "no.such:one"'),
            r"its function 'no.such:one' is not there",
        ),
        (HALVED.replace('Parameter("weight", "n', 'Parameter("rank", "n'), r"a parameter cannot be named 'rank'"),
    ],
)
def test_what_cannot_work_is_refused_before_a_recipe_is_read(
    text: str, message: str, models: list[str], tmp_path: Path
) -> None:
    file, before = written(tmp_path, text), dict(METHODS)
    with pytest.raises(RecipeError, match=message):
        polymerge.plan(asked(models, "halved", 1), methods=file)
    assert dict(METHODS) == before
    ran = cli(
        "merge", recipe_file(asked(models, "halved", 1), tmp_path / "r.yaml"), "--methods", file, "-o", tmp_path / "o"
    )
    assert ran.status == 2
    assert "--methods: " in ran.err
    assert not (tmp_path / "o").exists()


def test_files_that_are_none_and_names_of_two_files(tmp_path: Path) -> None:
    for said, message in ((tmp_path / "none.py", "there is no such file"), (tmp_path, "there is no such file")):
        with pytest.raises(RecipeError, match=message):
            add_methods(said)
    one, other = written(tmp_path), written(tmp_path, HALVED + "#", "other.py")
    add_methods(one)
    with pytest.raises(RecipeError, match=rf"the name is taken by a method of {one}"):
        add_methods(other)


def test_workers_in_other_processes_merge_by_the_text(tmp_path: Path) -> None:
    own_sum = HALVED.replace("halved", "summed").replace("one / 2", "one")
    file, prompts = written(tmp_path, own_sum), prompts_file(tmp_path / "prompts", 4)
    how = ("--values", "0,1.5", "--scorer", "exact", "--torch-threads", "1")
    done(*words(tmp_path, prompts, *how, run="theirs"))
    recipe_file(recipe("summed"), tmp_path / "recipe.yaml")
    done(*words(tmp_path, prompts, *how, "--methods", file, "--workers", "2", run="ours"))
    ours, theirs = outcome(tmp_path / "ours"), outcome(tmp_path / "theirs")
    assert ours["scores"] == theirs["scores"]
    assert ours["settings"]["methods"] == {"summed": f"sha256 {MethodsFile.read(file).sha256}"}
    # another text makes another search
    written(tmp_path, own_sum + "#")
    refused(
        "holds a search with other settings: methods", *words(tmp_path, prompts, *how, "--methods", file, run="ours")
    )


def test_a_job_goes_with_the_text_and_not_with_the_path(tmp_path: Path) -> None:
    file = written(tmp_path)
    add_methods(file)
    job = Job(None)
    assert job.methods == (MethodsFile.read(file),)
    file.unlink()  # another machine does not have it
    sent = pickle.dumps(job)
    table.register("halved", None)
    own._OWN.clear()
    with pytest.raises(PolymergeError):
        Worker(pickle.loads(sent)).take(None)  # there is no model either
    assert METHODS["halved"].title == "half a sum"


class Installed:
    """An entry point as importlib has it."""

    def __init__(self, name: str, value: object) -> None:
        self.name, self.value, self.dist = name, "package:ROW", None
        self._value = value

    def load(self) -> object:
        if isinstance(self._value, Exception):
            raise self._value
        return self._value


def offered(monkeypatch: pytest.MonkeyPatch, name: str, value: object) -> None:
    monkeypatch.setattr(own, "entry_points", lambda group: [Installed(name, value)] * (group == "polymerge.methods"))


def test_an_installed_package_s_method_is_loaded_where_a_recipe_names_it(
    models: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offered(monkeypatch, "damped", RuntimeError("broken"))
    assert polymerge.plan(asked(models, "task_arithmetic", 1)).steps  # a package that is not asked for is not loaded
    with pytest.raises(Refused, match=r"there is no method 'damp'\. Did you mean 'damped'"):
        polymerge.plan(asked(models, "damp", 1))
    with pytest.raises(Refused, match=r"entry point damped = package:ROW: cannot be loaded: RuntimeError: broken"):
        polymerge.plan(asked(models, "damped", 1))
    offered(monkeypatch, "damped", METHODS["ties"])
    with pytest.raises(RecipeError, match=r"has to be the row of a method 'damped' \(a polymerge.Method\)"):
        find_method("damped")
    add_methods(written(tmp_path))
    row = METHODS["halved"]
    table.register("halved", None)
    own._OWN.clear()
    offered(monkeypatch, "halved", row)
    assert list(installed()) == ["halved"]
    plan = polymerge.plan(asked(models, "halved", 0.8))
    assert plan.methods == {"halved": "package:ROW"}
    assert "halved: half a sum" in cli("methods").out
