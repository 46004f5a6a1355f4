"""polymerge search from the command line: what it chooses, what it keeps, and how it goes on."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

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
from polymerge.tuning.search import SearchOptions, search
from polymerge.tuning.trials import Scoring
from running import cli, recipe_file
from search_made import BASE, REASON, VLM, done, outcome, prompts_file, recipe, refused, words

VALUES = [0.0, 0.5, 1.0, 1.5]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prompts_file(tmp_path_factory.mktemp("prompts"))


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory, prompts: Path) -> Path:
    """A finished run."""
    folder = tmp_path_factory.mktemp("searched")
    done(*words(folder, prompts, "--values", "0:1.5:0.5"))
    return folder / "run"


@pytest.fixture
def run(searched: Path, tmp_path: Path) -> Path:
    """A copy of the finished run, to go on with, with its recipe beside it."""
    shutil.copy(searched.parent / "recipe.yaml", tmp_path)
    return Path(shutil.copytree(searched, tmp_path / "run"))


def answers(run: Path) -> list[dict[Any, str]]:
    found = []
    for value in VALUES:
        lines = (run / "candidates" / f"weight-{value:g}" / "answers.jsonl").read_text(encoding="utf-8").splitlines()
        found.append({entry["id"]: entry["answer"] for entry in map(json.loads, lines)})
    return found


GRID = ("--values", "0:1.5:0.5", "--samples", "6")


@pytest.fixture
def few(tmp_path: Path) -> Path:
    """Prompts of a test's own, which it may change."""
    return prompts_file(tmp_path / "prompts", 6)


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
    assert names == {
        "run.json", "prompts.jsonl", "candidates", "search.json", "recipe.yaml", "search.png", "search.svg",
    }  # fmt: skip
    written = polymerge.read_recipe(searched / "recipe.yaml")
    assert written.models[1].parameters["weight"] == outcome(searched)["chosen"]
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
    done(*words(run.parent, prompts, "--values", "0:1.5:0.5"))
    assert outcome(run) == before


def test_more_values_generate_only_the_new_ones(run: Path, prompts: Path) -> None:
    before = {file: file.read_bytes() for file in (run / "candidates").rglob("*.jsonl")}
    done(*words(run.parent, prompts, "--values", "0:1.5:0.25"))
    assert all(file.read_bytes() == data for file, data in before.items())
    assert len(list((run / "candidates").iterdir())) == 7


def test_a_run_that_was_cut_short_goes_on(run: Path, prompts: Path) -> None:
    before, texts = outcome(run), answers(run)
    whole = run / "candidates" / "weight-1" / "answers.jsonl"
    whole.write_bytes(whole.read_bytes()[:-7])  # in the middle of a line
    shutil.rmtree(run / "candidates" / "weight-0.5")
    (run / "search.json").unlink()
    done(*words(run.parent, prompts, "--values", "0:1.5:0.5"))
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
    done(*words(run.parent, prompts, "--values", "0:1:0.5", "--samples", "5", "--force"))
    assert outcome(run)["prompts"] == 5
    assert len(list((run / "candidates").iterdir())) == 3


def test_a_folder_that_is_no_run_is_left_alone(prompts: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("all of it")
    refused("is not the folder of a search", *words(tmp_path, prompts, "--force"), status=1)
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
    done(*words(run.parent, prompts, *more))
    assert outcome(run)["chosen"] == outcome(run)["minima"][0]
    assert outcome(run)["scores"] == pytest.approx(scores)


def test_the_outcome_as_values(run: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    no_generation(monkeypatch)
    options = SearchOptions(
        vary=[Knob("weight", values=tuple(VALUES))], keep_template_weight=True,
        scoring=Scoring("exact", choose=False), generation=Generation(max_new_tokens=3),
    )  # fmt: skip
    found = search(recipe(), PromptSource(prompts), run, options)
    told = outcome(run)
    assert found.folder == run
    assert found.best == {"weight": told["chosen"]}
    assert [point.value for point in found.curve] == [{"weight": value} for value in VALUES]
    assert [point.difference for point in found.curve] == [None, *told["differences"], None]
    assert [point.score for point in found.curve] == told["scores"]
    assert found.recipe.models[1].parameters["weight"] == told["chosen"]


def test_the_chosen_value_is_merged(run: Path, prompts: Path, tmp_path: Path) -> None:
    done(*words(run.parent, prompts, "--values", "0:1.5:0.5", "--write", tmp_path / "merged"))
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
    done(*words(tmp_path, prompts, "--samples", "4", "--vary", vary, "--values", "0.2,0.6,1"))
    assert outcome(tmp_path / "run")["vary"] == vary
    hashes = outcome(tmp_path / "run")["plans"]
    assert len(set(hashes)) == 3


def test_several_parameters_on_a_grid(prompts: Path, tmp_path: Path) -> None:
    vary = ("--vary", "weight@layers:0-1=0.5,1", "--vary", "scale=0.5,1", "--scorer", "exact", "--samples", "8")
    done(*words(tmp_path, prompts, *vary))
    found = outcome(tmp_path / "run")
    assert found["values"] == [[0.5, 0.5], [0.5, 1.0], [1.0, 0.5], [1.0, 1.0]]
    assert found["chosen"] == found["values"][found["scores"].index(max(found["scores"]))]
    assert len(set(found["plans"])) == 4


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
    done(*words(run.parent, prompts, *more, "--criterion", "sum"))
    asked = [json.loads(line)["id"] for line in (run / "prompts.jsonl").read_text(encoding="utf-8").splitlines()]
    vectors = [encoder.encode([given[one] for one in asked], normalize_embeddings=True) for given in answers(run)]
    apart = [1 - (one * other).sum(axis=1).mean() for one, other in pairwise(vectors)]
    literal = [apart[0] + apart[1], apart[1] + apart[2]]
    assert outcome(run)["differences"] == pytest.approx(literal, abs=1e-6)
    assert max(literal) > 0
    refused("is no sentence-transformers model", *words(run.parent, prompts, *more[:-1], tmp_path / "nowhere"))


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
    done(*words(tmp_path, prompts, *more))
    found = outcome(tmp_path / "run")
    assert found["candidates"] == [2.0]
    polymerge.merge({**made, "parameters": {"scale": 2.0}}, tmp_path / "literal")
    name = "adapter_model.safetensors"
    assert (tmp_path / "merged" / name).read_bytes() == (tmp_path / "literal" / name).read_bytes()
    folded = tmp_path / "folded"
    done("fold", tmp_path / "literal", "--base", VLM, "-o", folded)
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
    ran = cli(*words(tmp_path, bad, "--vary", "wieght[0]@layers:5-0", "--values", "0:q:1"))
    for told in ("'layers:5-0' is no range", "'q' in '0:q:1' is no number", "Did you mean 'weight'"):
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
    refused(told, *words(tmp_path, prompts, *more))
    assert not (tmp_path / "run").exists()


def test_prompts_without_answers_cannot_be_scored(prompts: Path, tmp_path: Path) -> None:
    lines = [json.loads(line) for line in prompts.read_text(encoding="utf-8").splitlines()]
    del lines[3]["answer"]
    for line in lines:
        line["image"] = str(prompts.parent / line["image"])
    file = tmp_path / "p.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    refused("1 of 24 prompts have no answer, the first of them 3", *words(tmp_path, file, "--scorer", "exact"))


def test_an_empty_list_of_prompts(tmp_path: Path) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    refused("an empty list", *words(tmp_path, empty))


@pytest.mark.parametrize(
    ("method", "told"),
    [("copy", "no free parameter"), ("metagpt", "no free parameter. Vary scale")],
)
def test_a_recipe_without_a_free_parameter(method: str, told: str, prompts: Path, tmp_path: Path) -> None:
    recipe_file(recipe(method), tmp_path / "recipe.yaml")
    refused(told, *words(tmp_path, prompts))


def test_where_answers_come_from_has_to_be_said(prompts: Path, tmp_path: Path) -> None:
    file = recipe_file(recipe(), tmp_path / "r.yaml")
    for more in ((), ("--prompts", prompts, "--from-logs", tmp_path)):
        ran = cli("search", file, "-o", tmp_path / "run", *more)
        assert ran.status == 2
        assert "say where answers come from" in ran.err
    refused("-o", "search", file, "--prompts", prompts)


def test_the_base_is_needed_for_deltas(prompts: Path, tmp_path: Path) -> None:
    made = recipe()
    del made["base_model"]
    recipe_file(made, tmp_path / "recipe.yaml")
    refused("needs base_model", *words(tmp_path, prompts))
    assert BASE


# --- what is varied has an effect


@pytest.mark.parametrize(
    ("changes", "vary"),
    [
        ({}, "weight@vision"),
        ({}, "weight@text.embed_tokens.weight"),
        ({"overrides": [{"match": "text.*", "parameters": {"weight": [0.5, 0.5]}}]}, "weight"),
    ],
)
def test_a_parameter_that_nothing_depends_on(changes: dict, vary: str, few: Path, tmp_path: Path) -> None:
    recipe_file(recipe(**changes), tmp_path / "recipe.yaml")
    refused("nothing that the recipe merges depends on it", *words(tmp_path, few, *GRID, "--vary", vary))


def test_the_recipe_s_own_overrides_keep_their_say(few: Path, tmp_path: Path) -> None:
    made = recipe("linear", overrides=[{"layers": "0-0", "merge_method": "copy"}])
    recipe_file(made, tmp_path / "recipe.yaml")
    done(*words(tmp_path, few, *GRID, "--vary", "weight@layers:0-1", "--write", tmp_path / "merged"))
    ours, theirs = (load_file(Path(folder) / "model.safetensors") for folder in (tmp_path / "merged", VLM))
    same = {name for name, tensor in ours.items() if tensor.equal(theirs[name])}
    assert all(name in same for name in ours if "language_model.model.layers.0." in name)


@pytest.mark.parametrize("spelled", ["{}/", "{}/../vlm"])
def test_the_template_is_found_among_the_models_however_it_is_spelled(spelled: str, few: Path, tmp_path: Path) -> None:
    made = {
        "merge_method": "linear",
        "template": spelled.format(VLM),
        "models": [{"model": REASON}, {"model": VLM}],
        "parts": ["text"],
    }
    file = recipe_file(made, tmp_path / "r.yaml")
    done("search", file, "--prompts", few, "--values", "0,0.2,0.4", "-o", tmp_path / "run", "--write", tmp_path / "m")
    record = json.loads((tmp_path / "m" / "polymerge.json").read_text(encoding="utf-8"))
    assert [one["parameters"]["weight"] for one in record["recipe"]["models"]] == [0.2, 0.8]


# --- answers are not mixed


def test_a_picture_that_has_changed(few: Path, tmp_path: Path) -> None:
    done(*words(tmp_path, few, *GRID))
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(few.parent / "0.png")
    refused("prompts was", *words(tmp_path, few, *GRID))


def test_a_checkpoint_that_has_changed_and_one_that_was_only_touched(few: Path, tmp_path: Path) -> None:
    other = tmp_path / "reason"
    shutil.copytree(REASON, other)
    made = recipe()
    made["models"][1]["model"] = str(other)
    recipe_file(made, tmp_path / "recipe.yaml")
    done(*words(tmp_path, few, *GRID))
    (other / "NOTES.txt").write_text("mine")
    (other / "model.safetensors").touch()
    done(*words(tmp_path, few, *GRID, "--criterion", "sum"))
    tensors = load_file(other / "model.safetensors")
    for tensor in tensors.values():
        tensor.mul_(1.5)
    stat = (other / "model.safetensors").stat()
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    os.utime(other / "model.safetensors", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    refused("inputs[1].content was", *words(tmp_path, few, *GRID))


def test_labels_that_come_later_do_not_matter_to_the_answers(few: Path, tmp_path: Path) -> None:
    lines = [json.loads(line) for line in few.read_text(encoding="utf-8").splitlines()]
    unlabelled = "".join(json.dumps({**line, "answer": None}) + "\n" for line in lines)
    bare = few.with_name("bare.jsonl")
    bare.write_text(unlabelled.replace(', "answer": null', ""), encoding="utf-8")
    done(*words(tmp_path, bare, *GRID))
    done(*words(tmp_path, few, *GRID, "--scorer", "exact"))
    assert len(outcome(tmp_path / "run")["scores"]) == 4


def test_a_start_that_failed_does_not_pin_the_folder(few: Path, tmp_path: Path) -> None:
    refused("cuda:7", *words(tmp_path, few, *GRID, "--device", "cuda:7"))
    done(*words(tmp_path, few, *GRID))


def test_two_processes_do_not_work_in_one_folder(few: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", "from polymerge.cli import main; main()"]
    told = list(map(str, words(tmp_path, few, *GRID)))
    first = subprocess.Popen([*command, *told], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 240
        while (
            not list((tmp_path / "run").glob("candidates/*")) and first.poll() is None and time.monotonic() < deadline
        ):
            time.sleep(0.01)
        assert first.poll() is None, "it was done too soon"
        refused("another process is at work in it", *told, status=1)
    finally:
        assert first.wait() == 0


# --- nothing is lost


def test_the_merged_model_does_not_take_the_place_of_the_run(few: Path, tmp_path: Path) -> None:
    for target in (tmp_path / "run", tmp_path / "run" / "merged", tmp_path):
        refused("the folder of the search", *words(tmp_path, few, *GRID, "--write", target, "--force"))
    done(*words(tmp_path, few, *GRID))
    (tmp_path / "run" / "mine.txt").write_text("kept")
    done(*words(tmp_path, few, *GRID, "--max-new-tokens", "2", "--force"))
    assert (tmp_path / "run" / "mine.txt").read_text() == "kept"


def test_an_output_that_is_there_is_found_before_the_search(few: Path, tmp_path: Path) -> None:
    (tmp_path / "merged").mkdir()
    refused("exists already", *words(tmp_path, few, *GRID, "--write", tmp_path / "merged"), status=1)
    assert not (tmp_path / "run").exists()


def test_a_run_read_as_logs_is_merged_by_what_it_varied(few: Path, tmp_path: Path) -> None:
    recipe_file(recipe("ties"), tmp_path / "recipe.yaml")
    done(*words(tmp_path, few, "--samples", "6", "--vary", "density", "--values", "0.2,0.5,0.9"))
    file = tmp_path / "recipe.yaml"
    done("search", file, "--from-logs", tmp_path / "run", "--write", tmp_path / "merged")
    record = json.loads((tmp_path / "merged" / "polymerge.json").read_text(encoding="utf-8"))
    assert record["recipe"]["parameters"] == {"density": 0.5}
    more = ("--vary", "weight", "--write", tmp_path / "other")
    refused("varied density", "search", file, "--from-logs", tmp_path / "run", *more)
    refused("no such recipe", "search", tmp_path / "nosuch.yaml", "--from-logs", tmp_path / "run", *more[2:])
    refused("whose outcome stays", "search", "--from-logs", tmp_path / "run", "-o", tmp_path / "run", status=1)


def test_mme_is_perception_whether_its_name_is_said_or_found(tmp_path: Path) -> None:
    from logged import laid_out

    golden, root = laid_out("limit_mme", tmp_path)
    said, found = (cli("search", "--from-logs", root, "--json", *more) for more in (("--task", "mme"), ()))
    assert said.out == found.out
    assert json.loads(found.out)["differences"] == golden["expected"]["smooth0"]["differences"]


# --- all that is wrong, at once


def test_what_would_not_do_anything_is_refused(few: Path, tmp_path: Path) -> None:
    ran = cli(
        "search", "--from-logs", tmp_path, "--scorer", "exact", "--workers", "3", "--question", "x", "--values", "1"
    )
    assert ran.status == 2
    assert all(f"--{name} is for --prompts" in ran.err for name in ("scorer", "workers", "question", "values"))
    ran = cli(*words(tmp_path, few, "--embedding-model", "m", "--trials", "3", "--having", "x"))
    assert ran.status == 2
    for told in ("--embedding-model is for --compare", "--trials is for a --sampler", "--having is for --from-logs"):
        assert told in ran.err


def test_every_mistake_of_the_command_line_is_told_with_those_of_the_files(tmp_path: Path) -> None:
    ran = cli("search", tmp_path / "nosuch.yaml", "--prompts", tmp_path / "nope", "--values", "0:q:1", "--task", "mme",
              "--criterion", "foo", "--compare", "bar", "--smooth", "-1", "--dtype", "x", "--batch-size", "0",
              "-o", tmp_path / "run")  # fmt: skip
    assert ran.status == 2
    for told in ("no such recipe", "nope", "'q'", "--task", "'foo'", "'bar'", "--smooth", "'x'", "--batch-size"):
        assert told in ran.err, told


@pytest.mark.parametrize("recipe_words", [(), ("--template", "a"), ("r.yaml", "--exclude", "x")])
def test_a_recipe_that_is_not_said_is_told_with_all_else(recipe_words: tuple[str, ...], tmp_path: Path) -> None:
    ran = cli("search", *recipe_words, "--prompts", tmp_path / "nope", "--vary", "weight=0:q:1", "-o", tmp_path / "run")
    assert ran.status == 2
    for told in ("recipe file", "merge_method is missing", "'q'", "nope"):
        assert told in ran.err, told


def test_a_grid_that_is_too_large(few: Path, tmp_path: Path) -> None:
    more = ("--scorer", "exact", "--vary", "weight=0:1:0.001", "--vary", "scale=0:1:0.001")
    refused("1002001 combinations", *words(tmp_path, few, *more))
