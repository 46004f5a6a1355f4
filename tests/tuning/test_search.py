"""polymerge search from the command line: what it chooses, what it keeps, and how it goes on."""

from __future__ import annotations

import json
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

import polymerge
from polymerge.checkpoints.loading import load_model, load_processor
from polymerge.evaluation.scorers import SCORERS
from polymerge.inference.answering import Answerer, batches
from polymerge.inference.generation import Generation
from polymerge.inference.prompts import PromptSource, read_prompts
from polymerge.inference.run_folder import AnswerLog
from polymerge.inference.worker_pool import WorkerPool
from polymerge.tuning.criterion import choose
from polymerge.tuning.knobs import Knob
from polymerge.tuning.search import search
from polymerge.tuning.trials import Scoring
from running import cli, recipe_file
from search_made import BASE, REASON, VLM, prompts_file, recipe, words

VALUES = [0.0, 0.5, 1.0, 1.5]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prompts_file(tmp_path_factory.mktemp("prompts"))


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory, prompts: Path) -> Path:
    """A finished run."""
    folder = tmp_path_factory.mktemp("searched")
    ran = cli(*words(folder, prompts, "--values", "0:1.5:0.5"))
    assert ran.status == 0, ran.err
    return folder / "run"


@pytest.fixture
def run(searched: Path, tmp_path: Path) -> Path:
    """A copy of the finished run, to go on with, with its recipe beside it."""
    shutil.copy(searched.parent / "recipe.yaml", tmp_path)
    return Path(shutil.copytree(searched, tmp_path / "run"))


def outcome(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "search.json").read_text(encoding="utf-8"))
    return found


def answers(run: Path) -> list[dict[Any, str]]:
    found = []
    for value in VALUES:
        lines = (run / "candidates" / f"weight-{value:g}" / "answers.jsonl").read_text(encoding="utf-8").splitlines()
        found.append({entry["id"]: entry["answer"] for entry in map(json.loads, lines)})
    return found


def no_generation(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("something was generated")

    monkeypatch.setattr(WorkerPool, "submit", refuse)


def test_the_choice_is_that_of_merging_each_value_to_disk(searched: Path, prompts: Path, tmp_path: Path) -> None:
    asked = read_prompts(prompts)
    literal = []
    for value in VALUES:
        made = recipe()
        made["models"][1]["parameters"]["weight"] = value
        polymerge.merge(made, tmp_path / f"{value}")
        answerer = Answerer(load_model(tmp_path / f"{value}"), load_processor(tmp_path / f"{value}"), max_new_tokens=3)
        literal.append(
            {
                prompt.id: answer
                for batch in batches(asked, 16)
                for prompt, answer in zip(batch, answerer.answer(batch), strict=True)
            }
        )
    assert answers(searched) == literal
    expected = choose(VALUES, [[given[prompt.id] for prompt in asked] for given in literal])
    found = outcome(searched)
    assert found["values"] == VALUES
    assert (found["candidates"], found["differences"]) == ([0.5, 1.0], list(expected.differences))
    assert (found["chosen"], found["minima"]) == (expected.chosen, list(expected.minima))
    assert any(found["differences"])
    plans = []
    for value in VALUES:
        made = recipe()
        made["models"][1]["parameters"]["weight"] = value
        plans.append(polymerge.plan(made).hash)
    assert found["plans"] == plans


def test_what_a_run_keeps(searched: Path, prompts: Path) -> None:
    names = {path.name for path in searched.iterdir()}
    assert names == {"run.json", "prompts.jsonl", "candidates", "search.json", "search.png", "search.svg"}
    assert (searched / "search.png").read_bytes().startswith(b"\x89PNG")
    assert "weight" in (searched / "search.svg").read_text(encoding="utf-8")
    kept = read_prompts(searched / "prompts.jsonl")
    assert {prompt.text for prompt in kept} <= {prompt.text for prompt in read_prompts(prompts)}
    assert len(kept) == outcome(searched)["prompts"] == 24
    found = outcome(searched)
    assert {"vary", "criterion", "compare", "smooth", "seed", "samples", "settings"} <= found.keys()


def test_a_finished_run_is_judged_again_without_generating(
    run: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_generation(monkeypatch)
    before = outcome(run)
    asked = [json.loads(line)["id"] for line in (run / "prompts.jsonl").read_text(encoding="utf-8").splitlines()]
    texts = [[given[one] for one in asked] for given in answers(run)]
    for criterion in ("union", "sum", "backward"):
        more = ("--values", "0:1.5:0.5", "--criterion", criterion)
        ran = cli(*words(run.parent, prompts, *more))
        assert ran.status == 0, ran.err
        assert outcome(run)["differences"] == list(choose(VALUES, texts, criterion).differences)
    assert cli(*words(run.parent, prompts, "--values", "0:1.5:0.5")).status == 0
    assert outcome(run) == before


def test_more_values_generate_only_the_new_ones(run: Path, prompts: Path) -> None:
    before = {file: file.read_bytes() for file in (run / "candidates").rglob("*.jsonl")}
    ran = cli(*words(run.parent, prompts, "--values", "0:1.5:0.25"))
    assert ran.status == 0, ran.err
    assert all(file.read_bytes() == data for file, data in before.items())
    assert len(list((run / "candidates").iterdir())) == 7


def test_a_run_that_was_cut_short_goes_on(run: Path, prompts: Path) -> None:
    before, texts = outcome(run), answers(run)
    whole = run / "candidates" / "weight-1" / "answers.jsonl"
    whole.write_bytes(whole.read_bytes()[:-7])  # in the middle of a line
    shutil.rmtree(run / "candidates" / "weight-0.5")
    (run / "search.json").unlink()
    ran = cli(*words(run.parent, prompts, "--values", "0:1.5:0.5"))
    assert ran.status == 0, ran.err
    assert outcome(run) == before
    assert answers(run) == texts


def test_another_run_s_answers_are_not_mixed_in(run: Path, prompts: Path) -> None:
    before = sorted(run.rglob("*"))
    for more, told in (
        (("--max-new-tokens", "2"), "max_new_tokens was 3, now 2"),
        (("--samples", "5"), "prompts was"),
        (("--batch-size", "4"), "batch_size was 16, now 4"),
        (("--vary", "scale"), 'vary was ["weight"], now ["scale"]'),
    ):
        ran = cli(*words(run.parent, prompts, "--values", "0:1.5:0.5", *more))
        assert ran.status == 2
        assert told in ran.err
        assert "--force" in ran.err
    assert sorted(run.rglob("*")) == before
    ran = cli(*words(run.parent, prompts, "--values", "0:1:0.5", "--samples", "5", "--force"))
    assert ran.status == 0, ran.err
    assert outcome(run)["prompts"] == 5
    assert len(list((run / "candidates").iterdir())) == 3


def test_a_folder_that_is_no_run_is_left_alone(prompts: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("all of it")
    ran = cli(*words(tmp_path, prompts, "--force"))
    assert ran.status == 1
    assert "is not the folder of a search" in ran.err
    assert (tmp_path / "run" / "thesis.tex").read_text() == "all of it"


def test_labels_choose_where_they_are_asked(run: Path, prompts: Path) -> None:
    asked = read_prompts(prompts)
    scores = [
        SCORERS["exact"].score([given[prompt.id] for prompt in asked], [prompt.answer for prompt in asked]).score
        for given in answers(run)
    ]
    ran = cli(*words(run.parent, prompts, "--values", "0:1.5:0.5", "--scorer", "exact", "--json"))
    assert ran.status == 0, ran.err
    found = json.loads(ran.out)
    assert found == outcome(run)
    assert found["scores"] == pytest.approx(scores)
    assert found["chosen"] == found["best"] == VALUES[scores.index(max(scores))]
    assert found["chosen_by"] == "exact"
    assert len(set(scores)) > 1
    more = ("--values", "0:1.5:0.5", "--scorer", "exact", "--choose-by", "criterion")
    assert cli(*words(run.parent, prompts, *more)).status == 0
    assert outcome(run)["chosen"] == outcome(run)["minima"][0]
    assert outcome(run)["scores"] == pytest.approx(scores)


def test_the_outcome_as_values(run: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    no_generation(monkeypatch)
    found = search(
        recipe(), PromptSource(prompts), run, vary=[Knob("weight", values=tuple(VALUES))], keep_template_weight=True,
        scoring=Scoring("exact", choose=False), generation=Generation(max_new_tokens=3),
    )  # fmt: skip
    told = outcome(run)
    assert found.folder == run
    assert found.best == {"weight": told["chosen"]}
    assert [point.value for point in found.curve] == [{"weight": value} for value in VALUES]
    assert [point.criterion for point in found.curve] == [None, *told["differences"], None]
    assert [point.score for point in found.curve] == told["scores"]
    assert found.recipe.models[1].parameters["weight"] == told["chosen"]


def test_the_chosen_value_is_merged(run: Path, prompts: Path, tmp_path: Path) -> None:
    ran = cli(*words(run.parent, prompts, "--values", "0:1.5:0.5", "--write", tmp_path / "merged"))
    assert ran.status == 0, ran.err
    made = recipe()
    made["models"][1]["parameters"]["weight"] = outcome(run)["chosen"]
    polymerge.merge(made, tmp_path / "literal")
    name = "model.safetensors"
    assert (tmp_path / "merged" / name).read_bytes() == (tmp_path / "literal" / name).read_bytes()


def test_a_run_is_read_as_logs(run: Path, tmp_path: Path) -> None:
    ran = cli("search", "--from-logs", run, "--json", "-o", tmp_path / "again")
    assert ran.status == 0, ran.err
    found = json.loads(ran.out)
    for name in ("values", "candidates", "differences", "chosen", "minima"):
        assert found[name] == outcome(run)[name]
    assert {path.name for path in (tmp_path / "again").iterdir()} == {"search.json", "search.png", "search.svg"}
    ran = cli("search", recipe_file(recipe(), tmp_path / "r.yaml"), "--from-logs", run, "--keep-template-weight",
              "--write", tmp_path / "merged")  # fmt: skip
    assert ran.status == 0, ran.err
    record = json.loads((tmp_path / "merged" / "polymerge.json").read_text(encoding="utf-8"))
    assert record["recipe"]["models"][1]["parameters"]["weight"] == found["chosen"]


def test_without_a_recipe_file_and_by_the_default_weights(prompts: Path, tmp_path: Path) -> None:
    ran = cli("search", "--template", VLM, "--with", REASON, "--method", "linear", "--parts", "text", "--prompts",
              prompts, "--samples", "6", "--values", "0,0.5,1", "-o", tmp_path / "run", "--json")  # fmt: skip
    assert ran.status == 0, ran.err
    found = json.loads(ran.out)
    assert found["candidates"] == [0.5]
    assert found["vary"] == "weight"


@pytest.mark.parametrize("vary", ["scale", "density", "density@layers:0-1", "scale@text.layers.*.mlp.*"])
def test_any_number_of_the_method_can_vary(vary: str, prompts: Path, tmp_path: Path) -> None:
    recipe_file(recipe("ties"), tmp_path / "recipe.yaml")
    ran = cli(*words(tmp_path, prompts, "--samples", "4", "--vary", vary, "--values", "0.2,0.6,1"))
    assert ran.status == 0, ran.err
    assert outcome(tmp_path / "run")["vary"] == vary
    hashes = outcome(tmp_path / "run")["plans"]
    assert len(set(hashes)) == 3


def test_several_parameters_on_a_grid(prompts: Path, tmp_path: Path) -> None:
    vary = ("--vary", "weight@layers:0-1=0.5,1", "--vary", "scale=0.5,1", "--scorer", "exact", "--samples", "8")
    ran = cli(*words(tmp_path, prompts, *vary))
    assert ran.status == 0, ran.err
    found = outcome(tmp_path / "run")
    assert found["values"] == [[0.5, 0.5], [0.5, 1.0], [1.0, 0.5], [1.0, 1.0]]
    assert found["chosen"] == found["values"][found["scores"].index(max(found["scores"]))]
    assert len(set(found["plans"])) == 4


def test_a_sampler_goes_on_as_if_it_had_not_been_stopped(prompts: Path, tmp_path: Path) -> None:
    more = ("--vary", "weight=0:1.5", "--vary", "scale=0.5:1.5:0.25", "--vary", "normalize=true,false", "--scorer",
            "exact", "--sampler", "tpe", "--samples", "6")  # fmt: skip
    assert cli(*words(tmp_path, prompts, *more, "--trials", "5", run="whole")).status == 0
    assert cli(*words(tmp_path, prompts, *more, "--trials", "2", run="parts")).status == 0
    assert cli(*words(tmp_path, prompts, *more, "--trials", "5", run="parts")).status == 0
    whole, parts = outcome(tmp_path / "whole"), outcome(tmp_path / "parts")
    assert whole == parts
    assert len(whole["scores"]) == 5
    assert whole["chosen"] == whole["values"][whole["scores"].index(max(whole["scores"]))]


def test_a_trial_that_was_killed_under_way_is_done_again(prompts: Path, tmp_path: Path) -> None:
    import optuna

    more = ("--vary", "weight=0:1.5", "--scorer", "exact", "--sampler", "random", "--samples", "6", "--trials", "3")
    assert cli(*words(tmp_path, prompts, *more, run="whole")).status == 0
    assert cli(*words(tmp_path, prompts, *more[:-1], "1", run="parts")).status == 0
    journal = optuna.storages.JournalStorage(
        optuna.storages.journal.JournalFileBackend(str(tmp_path / "parts" / "optuna.journal"))
    )
    (name,) = optuna.get_all_study_names(journal)
    study = optuna.load_study(study_name=name, storage=journal, sampler=optuna.samplers.RandomSampler(seed=3))
    study.ask().suggest_float("weight", 0.0, 1.5)  # begun, and never told of
    assert cli(*words(tmp_path, prompts, *more, run="parts")).status == 0
    assert outcome(tmp_path / "whole") == outcome(tmp_path / "parts")


def test_answers_are_compared_by_embedding(run: Path, prompts: Path, tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import modules
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    said = sorted({word for given in answers(run) for text in given.values() for word in text.split()})
    backend = Tokenizer(WordLevel({word: place for place, word in enumerate(["<pad>", "<unk>", *said])}, "<unk>"))
    backend.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>").save_pretrained(
        tmp_path / "bert"
    )
    torch.manual_seed(0)
    config = BertConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                        intermediate_size=16, max_position_embeddings=64)  # fmt: skip
    BertModel(config).save_pretrained(tmp_path / "bert")
    transformer = modules.Transformer(str(tmp_path / "bert"), max_seq_length=16)
    encoder = SentenceTransformer(modules=[transformer, modules.Pooling(16)], device="cpu")
    encoder.save(str(tmp_path / "encoder"))

    more = ("--values", "0:1.5:0.5", "--compare", "embedding", "--embedding-model", tmp_path / "encoder")
    ran = cli(*words(run.parent, prompts, *more, "--criterion", "sum"))
    assert ran.status == 0, ran.err
    asked = [json.loads(line)["id"] for line in (run / "prompts.jsonl").read_text(encoding="utf-8").splitlines()]
    vectors = [encoder.encode([given[one] for one in asked], normalize_embeddings=True) for given in answers(run)]
    apart = [1 - (one * other).sum(axis=1).mean() for one, other in pairwise(vectors)]
    literal = [apart[0] + apart[1], apart[1] + apart[2]]
    assert outcome(run)["differences"] == pytest.approx(literal, abs=1e-6)
    assert max(literal) > 0
    ran = cli(*words(run.parent, prompts, *more[:-1], tmp_path / "nowhere"))
    assert ran.status == 2
    assert "is no sentence-transformers model" in ran.err


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # PEFT asks by the old name
def test_adapters_are_searched_like_checkpoints(prompts: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    for seed in (0, 1):
        torch.manual_seed(seed)
        peft = get_peft_model(load_model(VLM), LoraConfig(r=2, target_modules=r".*language_model.*\.(q_proj|v_proj)"))
        for name, parameter in peft.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.05)
        peft.save_pretrained(tmp_path / f"adapter{seed}")
    adapters = [str(tmp_path / f"adapter{seed}") for seed in (0, 1)]
    made = {"merge_method": "robustmerge", "base_model": VLM, "models": adapters}
    recipe_file(made, tmp_path / "recipe.yaml")
    more = ("--vary", "scale", "--values", "0,2,4", "--samples", "6", "--write", tmp_path / "merged")
    ran = cli(*words(tmp_path, prompts, *more))
    assert ran.status == 0, ran.err
    found = outcome(tmp_path / "run")
    assert found["candidates"] == [2.0]
    polymerge.merge({**made, "parameters": {"scale": 2.0}}, tmp_path / "literal")
    name = "adapter_model.safetensors"
    assert (tmp_path / "merged" / name).read_bytes() == (tmp_path / "literal" / name).read_bytes()
    folded = tmp_path / "folded"
    assert cli("fold", tmp_path / "literal", "--base", VLM, "-o", folded).status == 0
    answerer = Answerer(load_model(folded), load_processor(folded), max_new_tokens=3)
    asked = read_prompts(tmp_path / "run" / "prompts.jsonl")
    expected = {
        prompt.id: answer
        for batch in batches(asked, 16)
        for prompt, answer in zip(batch, answerer.answer(batch), strict=True)
    }
    assert AnswerLog(tmp_path / "run" / "candidates" / "scale-2" / "answers.jsonl").read() == expected


def test_every_mistake_is_told_at_once_and_nothing_is_made(prompts: Path, tmp_path: Path) -> None:
    lines = prompts.read_text(encoding="utf-8").splitlines()
    bad = tmp_path / "bad.jsonl"
    first = {"id": 0, "text": "how many", "image": "nowhere.png"}
    second = {**json.loads(lines[1]), "imge": "typo.png"}
    bad.write_text("\n".join(map(json.dumps, (first, second))) + "\n", encoding="utf-8")
    recipe_file({**recipe(), "modles": []}, tmp_path / "recipe.yaml")
    ran = cli(*words(tmp_path, bad, "--vary", "wieght", "--batch-size", "0"))
    assert ran.status == 2
    for told in ("nowhere.png", "line 1", "imge", "modles", "Did you mean 'weight'", "--batch-size: 0"):
        assert told in ran.err, told
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (("--values", "0,0.5"), "needs 3 values, got 2"),
        (("--values", "0:1"), "needs a step"),
        (("--values", "0.1,a,1"), "--vary weight: 'a' is no number"),
        (("--vary", "scale"), "--vary scale: say which values"),
        (("--vary", "scale=0,1,2", "--vary", "weight=0,1,2"), "several need `--scorer`"),
        (("--vary", "normalize=true,false"), "a number is varied"),
        (("--vary", "scale=0,1,2", "--values", "0,1,2"), "say them once"),
        (("--scorer", "exct"), "Did you mean 'exact'"),
        (("--scorer", "exact", "--vary", "weight=0:1"), "a grid needs a step"),
        (("--scorer", "exact", "--sampler", "tpee"), "Did you mean 'tpe'"),
        (("--scorer", "exact", "--sampler", "tpe", "--workers", "2"), "several are for a grid"),
        (("--sampler", "tpe"), "--sampler needs --scorer"),
        (("--samples", "-1"), "no number of prompts"),
        (("--criterion", "onion"), "Did you mean 'union'"),
        (("--dtype", "bfloat"), "Did you mean 'bfloat16'"),
        (("--task", "mme"), "--task is for --from-logs"),
        (("--field", "text"), "is not NAME=COLUMN"),
    ],
)
def test_what_cannot_be_searched(more: tuple[str, ...], told: str, prompts: Path, tmp_path: Path) -> None:
    ran = cli(*words(tmp_path, prompts, *more))
    assert ran.status == 2
    assert told in ran.err
    assert not (tmp_path / "run").exists()


def test_prompts_without_answers_cannot_be_scored(prompts: Path, tmp_path: Path) -> None:
    lines = [json.loads(line) for line in prompts.read_text(encoding="utf-8").splitlines()]
    del lines[3]["answer"]
    for line in lines:
        line["image"] = str(prompts.parent / line["image"])
    file = tmp_path / "p.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    ran = cli(*words(tmp_path, file, "--scorer", "exact"))
    assert ran.status == 2
    assert "1 of 24 prompts have no answer, the first of them 3" in ran.err


def test_an_empty_list_of_prompts(tmp_path: Path) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    ran = cli(*words(tmp_path, empty))
    assert ran.status == 2
    assert "an empty list" in ran.err


@pytest.mark.parametrize(
    ("method", "told"),
    [("copy", "no free parameter"), ("metagpt", "no free parameter. Vary scale")],
)
def test_a_recipe_without_a_free_parameter(method: str, told: str, prompts: Path, tmp_path: Path) -> None:
    recipe_file(recipe(method), tmp_path / "recipe.yaml")
    ran = cli(*words(tmp_path, prompts))
    assert ran.status == 2
    assert told in ran.err


def test_where_answers_come_from_has_to_be_said(prompts: Path, tmp_path: Path) -> None:
    file = recipe_file(recipe(), tmp_path / "r.yaml")
    for more in ((), ("--prompts", prompts, "--from-logs", tmp_path)):
        ran = cli("search", file, "-o", tmp_path / "run", *more)
        assert ran.status == 2
        assert "say where answers come from" in ran.err
    ran = cli("search", file, "--prompts", prompts)
    assert ran.status == 2
    assert "-o" in ran.err


def test_the_base_is_needed_for_deltas(prompts: Path, tmp_path: Path) -> None:
    made = recipe()
    del made["base_model"]
    recipe_file(made, tmp_path / "recipe.yaml")
    ran = cli(*words(tmp_path, prompts))
    assert ran.status == 2
    assert "needs base_model" in ran.err
    assert BASE
