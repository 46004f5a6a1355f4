"""polymerge ablate: a range is merged as its recipe says, all else is the template's, and gains are paired."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

import polymerge
from adapters_made import adapter, llama
from polymerge.analysis.layerwise import in_layers, layerwise
from polymerge.checkpoints.loading import load_model, load_processor
from polymerge.cli.analyze import ablate as command
from polymerge.errors import RecipeError, Refused
from polymerge.evaluation.scorers import SCORERS
from polymerge.inference.answering import Answerer, batches
from polymerge.inference.generation import Generation
from polymerge.inference.prompts import read_prompts
from polymerge.inference.run_folder import AnswerLog
from polymerge.inference.worker_pool import WorkerPool
from polymerge.planning import make_plan
from polymerge.planning.folding import fold_recipe
from polymerge.recipe.parsing import read_recipe
from polymerge.recipe.recipe import recipe_dict
from running import recipe_file
from search_made import VLM, prompts_file, recipe
from tiny import build, load, perturbed, related_llm

SHORT = Generation(max_new_tokens=3, torch_threads=1)  # models this small are fastest on one
RANGES = {"early": [0], "middle": [1, 2], "late": [3], "full": [0, 1, 2, 3]}


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prompts_file(tmp_path_factory.mktemp("prompts"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, prompts: Path) -> Path:
    """The folder of a finished run."""
    out = tmp_path_factory.mktemp("finished") / "run"
    layerwise(recipe(), {"all": prompts}, out, scorer="exact", generation=SHORT)
    return out


def outcome(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "ablation.json").read_text(encoding="utf-8"))
    return found


def kept(run: Path, name: str) -> dict[int | str, str]:
    return AnswerLog(run / "candidates" / f"all,{name}" / "answers.jsonl").read()


def test_each_range_answers_as_its_recipe_merged_to_disk(finished: Path, prompts: Path, tmp_path: Path) -> None:
    asked = read_prompts(prompts)
    polymerge.merge(recipe(), tmp_path / "whole")
    template, whole = load(Path(VLM)), load(tmp_path / "whole")
    found = outcome(finished)
    assert {entry["name"]: entry["layers"] for entry in found["ranges"]} == RANGES
    for entry in found["ranges"]:
        folder = tmp_path / entry["name"]
        polymerge.merge(entry["recipe"], folder)
        assert make_plan(entry["recipe"]).hash == entry["plan"]
        for name, tensor in load(folder).items():
            layer = re.search(r"language_model.*layers\.(\d+)\.", name)
            inside = entry["name"] == "full" or (layer is not None and int(layer[1]) in entry["layers"])
            assert torch.equal(tensor, (whole if inside else template)[name]), (entry["name"], name)
        answerer = Answerer(load_model(folder), load_processor(folder), max_new_tokens=3)
        literal = {
            prompt.id: answer
            for batch in batches(asked, SHORT.batch_size)
            for prompt, answer in zip(batch, answerer.answer(batch), strict=True)
        }
        assert kept(finished, entry["name"]) == literal
        scored = SCORERS["exact"].score([literal[one.id] for one in asked], [one.answer for one in asked])
        assert entry["tasks"]["all"]["score"] == pytest.approx(scored.score)
    assert len({json.dumps(kept(finished, name)) for name in (*RANGES, "baseline")}) > 2


def test_gains_and_intervals_are_of_pairs(finished: Path) -> None:
    found = outcome(finished)
    before = np.array(found["baseline"]["all"]["samples"])
    assert found["baseline"]["all"]["score"] == pytest.approx(100 * before.mean())
    dice = np.random.default_rng(0)
    for entry in found["ranges"]:
        told = entry["tasks"]["all"]
        gains = 100 * (np.array(told["samples"]) - before)
        assert told["gain"] == pytest.approx(gains.mean())
        literal = gains[dice.integers(0, len(gains), (4000, len(gains)))].mean(axis=1)
        low, high = np.percentile(literal, (2.5, 97.5))
        assert told["interval"] == pytest.approx([low, high], abs=4.5)  # one of 24 prompts is 4.2 points


def test_a_finished_run_is_counted_again_to_the_byte(
    finished: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("something was generated")

    monkeypatch.setattr(WorkerPool, "submit", refuse)
    before = (finished / "ablation.json").read_bytes()
    done = layerwise(recipe(), {"all": prompts}, finished, scorer="exact", generation=SHORT)
    assert (finished / "ablation.json").read_bytes() == before
    assert done.ranges[-1].recipe == recipe_dict(read_recipe(recipe()))
    files = {path.name for path in finished.iterdir()}
    assert files == {"run.json", "candidates", "tasks", "ablation.json", "ablation.png", "ablation.svg"}


def test_a_run_that_was_cut_short_goes_on_and_another_s_answers_are_refused(prompts: Path, tmp_path: Path) -> None:
    file = recipe_file(recipe(), tmp_path / "recipe.yaml")
    words = [file, "--prompts", f"all={prompts}", "--scorer", "exact", "--samples", "8", "--window", "3",
             "--max-new-tokens", "3", "--torch-threads", "1", "-o", tmp_path / "run"]  # fmt: skip
    first = CliRunner().invoke(command, [*map(str, words), "--json"], catch_exceptions=False)
    assert [entry["name"] for entry in json.loads(first.stdout)["ranges"]] == ["0-2", "1-3"]
    log = tmp_path / "run" / "candidates" / "all,1-3" / "answers.jsonl"
    log.write_bytes(log.read_bytes()[:-5])  # in the middle of a line
    (tmp_path / "run" / "ablation.json").unlink()
    again = CliRunner().invoke(command, list(map(str, words)), catch_exceptions=False)
    assert json.dumps(outcome(tmp_path / "run")) == json.dumps(json.loads(first.stdout))
    for line in ("nothing", "layers 0-2", "layers 1-3"):
        assert line in again.stdout
    with pytest.raises(RecipeError, match=r"recipe\S* was"):
        layerwise({**recipe(), "seed": 5}, {"all": prompts}, tmp_path / "run", scorer="exact", samples=8,
               window=3, generation=SHORT)  # fmt: skip


def test_what_is_in_no_layer_is_merged_in_full_only(tmp_path: Path) -> None:
    vlm = build("llava", tmp_path / "vlm", layers=3)
    other = perturbed(vlm, tmp_path / "other", seed=4)
    made = {"merge_method": "linear", "models": [str(vlm), str(other)], "parameters": {"weight": 0.5},
            "overrides": [{"layers": "1-1", "merge_method": "slerp", "parameters": {"t": 0.25}}]}  # fmt: skip
    full = make_plan(made)
    assert isinstance(full, polymerge.Plan)
    parts = {step.canonical.partition(".")[0] for step in full.steps if step.pieces}
    assert parts == {"text", "vision", "projector"}
    ranged = in_layers(read_recipe(made), full, (1, 2), 3)
    plan = make_plan(recipe_dict(ranged))
    assert isinstance(plan, polymerge.Plan)
    of = {step.name: step for step in full.steps}
    merged = [step for step in plan.steps if step.pieces]
    assert {step.canonical.split(".")[2] for step in merged} == {"1", "2"}
    assert len(merged) == sum(".layers.1." in name or ".layers.2." in name for name in of if "language_model" in name)
    for step in merged:
        setting, whole = step.pieces[0].setting, of[step.name].pieces[0].setting
        assert setting is not None
        assert whole is not None
        assert plan.settings[setting] == full.settings[whole]  # the recipe's own override is still there


def test_ranges_of_all_kinds_together(prompts: Path, tmp_path: Path) -> None:
    done = layerwise(
        recipe(), {"prompts": prompts}, tmp_path / "run", scorer="exact", ranges=["full"], layers=[(0, 1), (3,)],
        window=2, stride=2, samples=4, generation=SHORT,
    )  # fmt: skip
    assert [one.name for one in done.ranges] == ["full", "0-1", "3", "2-3"]


def test_every_mistake_is_told_at_once_and_nothing_is_made(prompts: Path, tmp_path: Path) -> None:
    with pytest.raises(Refused) as refused:
        layerwise(
            {**recipe(), "sed": 1}, {"one": prompts, "other": "nowhere.jsonl"}, tmp_path / "run", scorer="exat",
            stride=2, ranges=("erly", "full"), layers=[range(2, 10)], generation=Generation(batch_size=0),
        )  # fmt: skip
    told = str(refused.value)
    for word in (
        "unknown field 'sed'", "nowhere.jsonl", "Did you mean 'exact'", "Did you mean 'early'", "say `window`",
        "there is no layer 9, the model has 0-3", "batch-size: 0",
    ):  # fmt: skip
        assert word in told, word
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ({"window": 5}, "window: 5 layers of 4"),
        ({"window": 0}, "window: 0 is not at least 1"),
        ({"window": 2, "stride": 0}, "stride: 0 is not at least 1"),
    ],
)
def test_windows_that_cannot_slide(how: dict[str, int], told: str, prompts: Path, tmp_path: Path) -> None:
    with pytest.raises(Refused, match=told):
        layerwise(recipe(), {"prompts": prompts}, tmp_path / "run", scorer="exact", **how)


def test_a_range_in_which_nothing_is_merged_is_named(prompts: Path, tmp_path: Path) -> None:
    made = recipe(overrides=[{"layers": "3-3", "merge_method": "copy"}])
    with pytest.raises(Refused, match=r"merging late \(3\): nothing would be merged"):
        layerwise(made, {"prompts": prompts}, tmp_path / "run", scorer="exact")


def test_a_tower_of_two_layers_has_no_middle(prompts: Path, tmp_path: Path) -> None:
    vlm = build("llava", tmp_path / "vlm")
    llm = related_llm(vlm, tmp_path / "llm", seed=1)
    made = {"merge_method": "linear", "models": [str(vlm), str(llm)], "parameters": {"weight": 0.5}}
    with pytest.raises(Refused, match="2 layers has none in the middle third"):
        layerwise(made, {"prompts": prompts}, tmp_path / "run", scorer="exact")


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # PEFT asks by the old name
def test_of_adapters_only_the_modules_in_a_range_are_adapted(prompts: Path, tmp_path: Path) -> None:
    adapters = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        peft = get_peft_model(load_model(VLM), LoraConfig(r=2, target_modules=r".*language_model.*\.(q_proj|v_proj)"))
        for name, parameter in peft.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.3)
        peft.save_pretrained(tmp_path / str(seed))
        adapters.append(str(tmp_path / str(seed)))
    made = {"merge_method": "robustmerge", "base_model": VLM, "models": adapters}
    done = layerwise(
        made, {"all": prompts}, tmp_path / "run", scorer="exact", layers=[(1, 2)], ranges=["full"], samples=8,
        generation=SHORT,
    )  # fmt: skip
    asked = read_prompts(tmp_path / "run" / "tasks" / "all" / "prompts.jsonl")
    ranges = {one.name: one.layers for one in done.ranges}
    assert sorted(ranges.values()) == [(0, 1, 2, 3), (1, 2)]
    for name, layers in ranges.items():
        folder = tmp_path / name
        folder.mkdir()
        polymerge.merge(made, folder / "adapter", check=False)
        file = folder / "adapter" / "adapter_model.safetensors"
        tensors = {
            key: tensor
            for key, tensor in load_file(file).items()
            if int(re.findall(r"layers\.(\d+)", key)[0]) in layers
        }
        save_file(tensors, file, metadata={"format": "pt"})
        polymerge.merge(fold_recipe(str(folder / "adapter"), VLM), folder / "folded", check=False)
        answerer = Answerer(load_model(folder / "folded"), load_processor(folder / "folded"), max_new_tokens=3)
        literal = {
            prompt.id: answer
            for batch in batches(asked, SHORT.batch_size)
            for prompt, answer in zip(batch, answerer.answer(batch), strict=True)
        }
        assert kept(tmp_path / "run", name) == literal
    assert kept(tmp_path / "run", "full") != kept(tmp_path / "run", "baseline")


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
def test_adapters_without_a_base_or_without_a_module_in_a_range(prompts: Path, tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base")
    adapters = [str(adapter(tmp_path / str(n), n, target_modules=["q_proj"], layers_to_transform=[0])) for n in (0, 1)]
    made = {"merge_method": "robustmerge", "models": adapters}
    with pytest.raises(Refused, match="name no base"):
        layerwise(made, {"all": prompts}, tmp_path / "run", scorer="exact")
    made["base_model"] = str(tmp_path / "base")
    with pytest.raises(Refused, match="no adapter has a module in these layers"):
        layerwise(made, {"all": prompts}, tmp_path / "run", scorer="exact", layers=[(1,)])
