"""The real vLLM as an engine: the answers are transformers', and a search makes the same choice."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import served
from environments import environment
from running import cli, recipe_file
from search_made import VLM, done, outcome, prompts_file, recipe
from tiny import perturbed

pytestmark = environment("vllm")

WORDS = (
    "what is the sum of two and three ?", "the colour of the ball is red , green or blue .",
    "name the largest of them", "describe what you see in this image",
)  # fmt: skip

RIGHT = 0.75
"""The weight whose answers count as right."""
OUTCOME = ("candidates", "differences", "minima", "chosen", "scores", "best")
"""What a search finds, beside its settings."""


def by_vllm(vllm: str, length: int = 1024) -> tuple[str, ...]:
    small = {"max_model_len": length, "kv_cache_memory_bytes": 1 << 26}
    options = [word for name, value in small.items() for word in ("--engine-option", f"{name}={value}")]
    return ("--engine", "vllm", "--environment", vllm, *options)


def answers_in(run: Path) -> dict[str, dict[Any, str]]:
    return {
        str(file.relative_to(run)): {
            one["id"]: one["answer"] for one in map(json.loads, file.read_text(encoding="utf-8").splitlines())
        }
        for file in sorted(run.rglob("answers.jsonl"))
    }


def share(one: Path, other: Path) -> float:
    """The share of equal answers of two runs."""
    pairs = [(answer, answers_in(other)[file][name]) for file, own in answers_in(one).items()
             for name, answer in own.items()]  # fmt: skip
    return sum(a == b for a, b in pairs) / len(pairs)


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("questions")
    asked = []
    for number in range(12):
        picture = Image.linear_gradient("L").rotate(30 * number).resize((40 + 4 * number, 90 - 3 * number))
        picture.convert("RGB").save(folder / f"{number}.png")
        image = {"image": f"{number}.png"} if number % 4 else {}
        asked.append({"question_id": number, "text": WORDS[number % 3], "answer": "red", **image})
    (folder / "q.json").write_text(json.dumps(asked), encoding="utf-8")
    lines = [{"id": one.pop("question_id"), **one} for one in asked]
    (folder / "p.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines), encoding="utf-8")
    return folder


def with_answers(prompts: Path, answers: Mapping[Any, str]) -> Path:
    """The prompts with these answers to count as right, beside them."""
    asked = [json.loads(line) for line in prompts.read_text(encoding="utf-8").splitlines()]
    file = prompts.with_name("answered.jsonl")
    file.write_text("".join(json.dumps(one | {"answer": answers[one["id"]]}) + "\n" for one in asked), encoding="utf-8")
    return file


@pytest.mark.parametrize("family", served.FAMILIES)
def test_a_family_answers_the_same(family: str, vllm: str, questions: Path, tmp_path: Path) -> None:
    """A search of five weights: that of the template, as it was loaded, and four for which weights are put in. What one
    of them answers counts as right, so that the choice is no tie.
    """
    one = served.build(family, tmp_path / "one", dtype="float32")
    other = perturbed(one, tmp_path / "other", seed=1, size=0.05)
    models = [{"model": str(model), "parameters": {"weight": 0.5}} for model in (one, other)]
    file = recipe_file({"merge_method": "linear", "template": str(one), "models": models}, tmp_path / "recipe.yaml")
    how = ("--samples", "0", "--values", "0:1:0.25", "--keep-template-weight")
    done("search", file, *how, "--prompts", questions / "p.jsonl", "-o", tmp_path / "unscored")
    prompts = with_answers(
        questions / "p.jsonl", answers_in(tmp_path / "unscored")[f"candidates/weight-{RIGHT}/answers.jsonl"]
    )
    said = ("search", file, *how, "--prompts", prompts, "--scorer", "exact")
    done(*said, "-o", tmp_path / "here")
    done(*said, "-o", tmp_path / "there", *by_vllm(vllm))
    here, there = outcome(tmp_path / "here"), outcome(tmp_path / "there")
    assert (here["chosen"], max(here["scores"]), here["scores"].count(100.0)) == (RIGHT, 100.0, 1)
    assert [there[key] for key in OUTCOME] == [here[key] for key in OUTCOME]
    told = [json.loads(one.read_text()) for one in sorted((tmp_path / "there").rglob("weights.json"))]
    # LLaVA looks at the layer before the last of its vision tower, and vLLM makes no last one
    assert all(".layers.2." in name or "post_layernorm" in name for one in told for name in one["not_located"])
    assert family.startswith("llava") or not any(one["not_located"] for one in told)
    assert all(one["read_back"] >= 8 for one in told[1:])
    assert share(tmp_path / "here", tmp_path / "there") == 1


def test_the_demo_s_search_knockout_and_ablation(vllm: str, tmp_path: Path) -> None:
    prompts = prompts_file(tmp_path / "prompts", 24)
    file = recipe_file(recipe(), tmp_path / "recipe.yaml")
    how = ("--prompts", prompts, "--max-new-tokens", "3", "--dtype", "float32", "--scorer", "exact")
    for run, more in (("here", ()), ("there", by_vllm(vllm, length=64))):
        done("search", file, *how, "--keep-template-weight", "--values", "0:1:0.25", "-o", tmp_path / run, *more)
        done("knockout", VLM, *how, "--modules", "mlp", "-o", tmp_path / f"knockout-{run}", *more)
        done("ablate", file, *how, "-o", tmp_path / f"ablate-{run}", *more)
    here, there = outcome(tmp_path / "here"), outcome(tmp_path / "there")
    assert [there[key] for key in OUTCOME] == [here[key] for key in OUTCOME]
    for kind in ("", "knockout-", "ablate-"):
        assert share(tmp_path / f"{kind}here", tmp_path / f"{kind}there") == 1


def test_what_vllm_refuses_is_said_whole(vllm: str, questions: Path, tmp_path: Path) -> None:
    folder = served.under_names_of_memory(served.build("llava", tmp_path / "vlm"))
    ran = cli("evaluate", folder, "--tasks", f"{questions / 'q.json'}:exact", "-o", tmp_path / "run", *by_vllm(vllm))
    assert ran.status == 1
    assert "vllm does not load the model" in ran.err
    assert "no module or parameter named" in ran.err
