"""polymerge knockout: what it puts in the place of weights, that it puts them back, and what it counts."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from torch import Tensor

import polymerge
from polymerge.analysis.baseline import Baseline, layer_words, layers_in, open_baseline, third_of
from polymerge.analysis.drops import drops, thirds
from polymerge.analysis.knockout import knockout
from polymerge.analysis.replacements import Cell, Replacement, knocked_out, make_cells, plan_parent
from polymerge.analysis.task_scores import Score
from polymerge.checkpoints.loading import load_model
from polymerge.cli.analyze import knockout as command
from polymerge.errors import RecipeError, Refused
from polymerge.evaluation.scorers import SCORERS
from polymerge.inference.generation import Generation
from polymerge.inference.live import LiveModel
from polymerge.inference.prompts import read_prompts
from polymerge.inference.run_folder import AnswerLog
from polymerge.inference.worker_pool import WorkerPool
from polymerge.planning import Plan
from running import cli, killed_in_the_middle
from search_made import BASE, VLM, answers_of, prompts_file, recipe
from tiny import as_2024, as_live, build, load, perturbed, related_llm

SHORT = Generation(max_new_tokens=3, torch_threads=1)  # models this small are fastest on one
LINE = [sys.executable, "-c", "from polymerge.cli.analyze import knockout; knockout()"]
PROJECTIONS = {"attention": r"self_attn\.[qkvo]_proj\.weight", "mlp": r"mlp\.(gate|up|down)_proj\.weight"}


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prompts_file(tmp_path_factory.mktemp("prompts"))


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's VLM with the reasoning model's delta."""
    folder = tmp_path_factory.mktemp("merged") / "merged"
    polymerge.merge(recipe(), folder)
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, prompts: Path, merged: Path) -> Path:
    """The folder of a finished run."""
    out = tmp_path_factory.mktemp("finished") / "run"
    knockout(merged, {"all": prompts}, out, scorer="exact", against=VLM, layers=(0, 1), generation=SHORT)
    return out


def outcome(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "knockout.json").read_text(encoding="utf-8"))
    return found


def opened(source: str | Path) -> Baseline:
    baseline = open_baseline(str(source), "model")
    assert baseline is not None
    return baseline


def plan_of(baseline: Baseline, cell: Cell, replacement: Replacement) -> Plan:
    parent = plan_parent(baseline, replacement.source) if replacement.kind == "from" else None
    return knocked_out(baseline, [cell], replacement, parent)[cell.name]


def digest(model: Any) -> str:
    """sha256 of all weights of a model in memory."""
    found = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def rewritten(
    source: str | Path, folder: Path, layers: tuple[int, ...], change: dict[str, Callable[..., Tensor]]
) -> Path:
    """A copy of a checkpoint with some tensors of some layers changed, by patterns of what their names end in."""
    source = Path(source)
    folder.mkdir()
    for file in source.iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    tensors = load_file(source / "model.safetensors")
    changed = 0
    for name in tensors:
        if "vision" in name or "visual" in name:
            continue
        for pattern, new in change.items():
            if any(re.search(rf"layers\.{layer}\.{pattern}$", name) for layer in layers):
                tensors[name] = new(tensors[name]).contiguous()
                changed += 1
    assert changed
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def uniform(tensor: Tensor) -> Tensor:
    return torch.full_like(tensor, 1 / tensor.shape[0])


REPLACEMENTS = [Replacement("uniform"), Replacement("zero"), Replacement("noise", size=0.5), Replacement("from", BASE)]


@pytest.mark.parametrize("replacement", REPLACEMENTS, ids=lambda one: one.kind)
def test_weights_come_back_to_the_bit(replacement: Replacement) -> None:
    baseline = opened(VLM)
    live = LiveModel(baseline.plan)
    before = digest(live.model)
    seen = set()
    for cell in (Cell("attention", (0,)), Cell("mlp", (1, 2)), Cell("both", (3,))):
        live.set(plan_of(baseline, cell, replacement))
        seen.add(digest(live.model))
        live.set(baseline.plan)
        assert digest(live.model) == before
    assert len(seen | {before}) == 4


@pytest.mark.parametrize("family", ["llava", "idefics2", "qwen2_vl", "phi3", "mixtral", "mllama"])
@pytest.mark.parametrize("replace", ["uniform", "noise", "from"])
def test_weights_of_any_family_come_back_to_the_bit(family: str, replace: str, tmp_path: Path) -> None:
    folder = build(family, tmp_path / "model", layers=6 if family == "mllama" else 2)
    baseline = opened(folder)
    live = LiveModel(baseline.plan)
    before = digest(live.model)
    other = str(perturbed(folder, tmp_path / "other", seed=3)) if replace == "from" else ""
    live.set(plan_of(baseline, Cell("both", (1,)), Replacement(replace, other)))
    assert digest(live.model) != before
    live.set(baseline.plan)
    assert digest(live.model) == before


@pytest.mark.parametrize("layout", [None, as_2024, as_live], ids=["saved", "2024", "live"])
def test_uniform_is_a_literal_rewrite_of_any_layout(layout: Any, tmp_path: Path) -> None:
    folder = build("llava", tmp_path / "model")
    if layout is not None:
        layout(folder)
    baseline = opened(folder)
    live = LiveModel(baseline.plan)
    for module, pattern in PROJECTIONS.items():
        live.set(plan_of(baseline, Cell(module, (1,)), Replacement("uniform")))
        literal = rewritten(folder, tmp_path / module, (1,), {pattern: uniform})
        assert digest(live.model) == digest(load_model(literal))


def test_uniform_knows_the_parts_of_what_is_fused(tmp_path: Path) -> None:
    folder = build("phi3", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    width = config["hidden_size"] // config["num_attention_heads"]
    q, kv = config["num_attention_heads"] * width, config["num_key_value_heads"] * width
    assert q != kv

    def fused(tensor: Tensor) -> Tensor:
        return torch.cat([uniform(block) for block in tensor.split([q, kv, kv])])

    literal = rewritten(folder, tmp_path / "new", (0,), {r"self_attn\.qkv_proj\.weight": fused,
                                                         r"self_attn\.o_proj\.weight": uniform})  # fmt: skip
    baseline = opened(folder)
    live = LiveModel(baseline.plan)
    live.set(plan_of(baseline, Cell("attention", (0,)), Replacement("uniform")))
    assert digest(live.model) == digest(load_model(literal))


def test_biases_stay_but_where_another_model_s_come(tmp_path: Path) -> None:
    folder = build("qwen2_vl", tmp_path / "model")
    other = related_llm(folder, tmp_path / "other", seed=5)
    theirs = load(other)
    baseline = opened(folder)
    live = LiveModel(baseline.plan)
    live.set(plan_of(baseline, Cell("attention", (1,)), Replacement("zero")))
    pattern = PROJECTIONS["attention"]
    assert digest(live.model) == digest(
        load_model(rewritten(folder, tmp_path / "zero", (1,), {pattern: torch.zeros_like}))
    )
    live.set(plan_of(baseline, Cell("attention", (1,)), Replacement("from", str(other))))
    change = {
        rf"self_attn\.{part}_proj\.{kind}": lambda _, name=f"{part}_proj.{kind}": theirs[
            f"model.layers.1.self_attn.{name}"
        ]
        for part in "qkvo"
        for kind in ("weight", "bias")
        if f"model.layers.1.self_attn.{part}_proj.{kind}" in theirs
    }
    assert len(change) == 7
    assert digest(live.model) == digest(load_model(rewritten(folder, tmp_path / "from", (1,), change)))


def test_noise_is_as_large_as_it_is_said_to_be_and_the_same_every_time() -> None:
    baseline = opened(VLM)
    before = load_model(VLM).state_dict()
    name = next(one for one in before if "language_model" in one and one.endswith("layers.1.mlp.up_proj.weight"))
    found = {}
    for size, seed in ((0.5, 1), (0.5, 2), (2.0, 1)):
        live = LiveModel(baseline.plan, threads=seed)
        for cell in (Cell("mlp", (1,)), Cell("both", (0, 1))):  # whatever else is replaced
            live.set(plan_of(baseline, cell, Replacement("noise", size=size, seed=seed)))
            again = live.model.state_dict()[name].clone().float()
            assert torch.equal(found.setdefault((size, seed), again), again)
    for (size, _), tensor in found.items():
        assert float(tensor.std() / before[name].float().std()) == pytest.approx(size, rel=0.02)
        assert float(tensor.mean().abs()) < 0.05 * float(tensor.std())
    assert not torch.equal(found[0.5, 1], found[0.5, 2])
    torch.testing.assert_close(found[0.5, 1] * 4, found[2.0, 1], rtol=2e-3, atol=1e-6)


def test_answers_are_those_of_a_rewritten_checkpoint(
    finished: Path, merged: Path, prompts: Path, tmp_path: Path
) -> None:
    kept = finished / "candidates"
    asked = read_prompts(finished / "tasks" / "all" / "prompts.jsonl")
    cells = {(cell["module"], cell["layers"][0]): cell for cell in outcome(finished)["cells"]}
    for module, pattern in PROJECTIONS.items():
        literal = answers_of(rewritten(merged, tmp_path / module, (1,), {pattern: uniform}), prompts)
        assert AnswerLog(kept / f"all,model-{module}-1" / "answers.jsonl").read() == literal
        scored = SCORERS["exact"].score([literal[one.id] for one in asked], [one.answer for one in asked])
        assert cells[module, 1]["model"]["score"] == pytest.approx(scored.score)
        assert cells[module, 1]["model"]["samples"] == list(scored.samples or ())


def test_what_a_run_says(finished: Path, merged: Path) -> None:
    found = outcome(finished)
    files = {path.name for path in finished.iterdir()}
    plots = {f"knockout-{kind}.{ending}" for kind in ("map", "curves") for ending in ("png", "svg")}
    assert files == {"run.json", "candidates", "tasks", "knockout.json", *plots}
    assert (finished / "knockout-map.png").read_bytes().startswith(b"\x89PNG")
    assert "attention" in (finished / "knockout-map.svg").read_text(encoding="utf-8")
    assert (found["model"], found["against"]) == (str(merged), VLM)
    assert (found["depth"], len(found["cells"]), len(found["summary"])) == (4, 4, 2)
    assert len(found["tasks"]["all"]["ids"]) == found["tasks"]["all"]["prompts"] == 24
    for cell in found["cells"]:
        assert cell["third"] == ("early", "middle")[cell["layers"][0]]
        for who in ("model", "against"):
            base = found["baseline"][who]["all"]
            assert cell[who]["drop"] == pytest.approx(base["score"] - cell[who]["score"])
            assert cell[who]["score"] == pytest.approx(100 * sum(cell[who]["samples"]) / 24)
            assert cell[who]["interval"][0] <= cell[who]["drop"] <= cell[who]["interval"][1]
        assert cell["difference"]["drop"] == pytest.approx(cell["model"]["drop"] - cell["against"]["drop"])


def test_a_merged_model_is_not_knocked_out_as_its_template_is(finished: Path) -> None:
    kept = finished / "candidates"
    for name in ("baseline", "attention-0", "mlp-1"):
        one, other = (AnswerLog(kept / f"all,{who}-{name}" / "answers.jsonl").read() for who in ("model", "against"))
        assert one != other, name
    found = outcome(finished)
    assert any(cell["model"]["drop"] != cell["against"]["drop"] for cell in found["cells"])
    assert len({cell["model"]["plan"] for cell in found["cells"]}) == len(found["cells"])


def test_from_itself_changes_no_weight_and_no_score(merged: Path, prompts: Path, tmp_path: Path) -> None:
    baseline = opened(merged)
    live = LiveModel(baseline.plan)
    before = digest(live.model)
    for cell in (Cell("both", (0, 1, 2, 3)), Cell("attention", (2,))):
        live.set(plan_of(baseline, cell, Replacement("from", str(merged))))
        assert digest(live.model) == before
    done = knockout(
        merged, {"prompts": prompts}, tmp_path / "run", scorer="exact", replace=Replacement("from", str(merged)),
        layers=(0, 3), modules=["both"], samples=12, generation=SHORT,
    )  # fmt: skip
    base = done.baseline["model"]["prompts"]
    assert [cell.model.samples for cell in done.cells] == [base.samples] * 2
    assert {cell.model.drop for cell in done.cells} == {0.0}
    assert done.summary[0].model.early.share is None  # of nothing


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # PEFT asks by the old name
def test_a_base_with_an_adapter_is_knocked_out_as_its_folded_checkpoint(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    peft = get_peft_model(load_model(VLM), LoraConfig(r=2, target_modules=r".*language_model.*\.(q_proj|up_proj)"))
    for name, parameter in peft.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    peft.save_pretrained(tmp_path / "adapter")
    polymerge.merge({"merge_method": "copy", "models": [f"{VLM}+{tmp_path / 'adapter'}"]}, tmp_path / "folded")
    joined, folded = opened(f"{VLM}+{tmp_path / 'adapter'}"), opened(tmp_path / "folded")
    one, other = LiveModel(joined.plan), LiveModel(folded.plan)
    for replacement in REPLACEMENTS:
        for cell in (Cell("attention", (1,)), Cell("mlp", (2, 3))):
            one.set(plan_of(joined, cell, replacement))
            other.set(plan_of(folded, cell, replacement))
            assert digest(one.model) == digest(other.model)
    one.set(joined.plan)
    assert digest(one.model) == digest(load_model(tmp_path / "folded"))


def test_a_finished_run_is_counted_again_to_the_byte(
    finished: Path, prompts: Path, merged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("something was generated")

    monkeypatch.setattr(WorkerPool, "submit", refuse)
    before = (finished / "knockout.json").read_bytes()
    how: dict[str, Any] = {"scorer": "exact", "against": VLM, "layers": (0, 1), "generation": SHORT}
    knockout(merged, {"all": prompts}, finished, **how, seed=7)
    other = outcome(finished)
    knockout(merged, {"all": prompts}, finished, **how)
    assert (finished / "knockout.json").read_bytes() == before
    assert [cell["model"]["interval"] for cell in other["cells"]] != [
        cell["model"]["interval"] for cell in outcome(finished)["cells"]
    ]
    assert [cell["model"]["drop"] for cell in other["cells"]] == [
        cell["model"]["drop"] for cell in outcome(finished)["cells"]
    ]


def test_killed_in_the_middle_and_resumed(finished: Path, prompts: Path, merged: Path, tmp_path: Path) -> None:
    words = [merged, "--prompts", f"all={prompts}", "--scorer", "exact", "--against", VLM, "--layers", "0-1",
             "--max-new-tokens", "3", "--torch-threads", "1", "-o", tmp_path / "run"]  # fmt: skip
    logs = tmp_path / "run" / "candidates"
    killed_in_the_middle([*LINE, *words], lambda: len(list(logs.glob("*/answers.jsonl"))) >= 2)
    assert not (tmp_path / "run" / "knockout.json").exists()
    ran = CliRunner().invoke(command, [*map(str, words), "--json"], catch_exceptions=False)
    assert ran.exit_code == 0
    assert (tmp_path / "run" / "knockout.json").read_bytes() == (finished / "knockout.json").read_bytes()
    assert json.loads(ran.stdout) == outcome(finished)


def test_two_workers_say_what_one_says(prompts: Path, tmp_path: Path) -> None:
    for workers in (1, 2):
        how = Generation(max_new_tokens=3, torch_threads=1, workers=workers)
        knockout(
            VLM, {"prompts": prompts}, tmp_path / str(workers), scorer="exact", replace=Replacement("noise"),
            modules=["both"], layers=(0, 1, 2), samples=6, generation=how,
        )  # fmt: skip
    one, two = ((tmp_path / str(workers) / "knockout.json").read_bytes() for workers in (1, 2))
    assert one == two


def test_the_table_that_is_printed(finished: Path, prompts: Path, merged: Path) -> None:
    words = [merged, "--prompts", f"all={prompts}", "--scorer", "exact", "--against", VLM, "--layers", "0-1",
             "--max-new-tokens", "3", "-o", finished]  # fmt: skip
    ran = CliRunner().invoke(command, list(map(str, words)), catch_exceptions=False)
    assert ran.exit_code == 0
    found = outcome(finished)
    assert "all: 24 prompts, exact: model" in ran.stdout
    for cell in found["cells"]:
        line = next(line for line in ran.stdout.splitlines() if f"{cell['model']['drop']:.1f} [" in line)
        assert "layer" in line or "third" in line
    assert "early third, 1 of 2: mean" in ran.stdout
    assert "late third, 0 of 2: mean" in ran.stdout


def test_another_run_s_answers_are_not_mixed_in(finished: Path, prompts: Path, merged: Path) -> None:
    how: dict[str, Any] = {"scorer": "exact", "against": VLM, "layers": (0, 1), "generation": SHORT}
    for more, told in (
        ({"replace": Replacement("zero")}, r"replace\S* was"),
        ({"samples": 5}, r"prompts\S* was"),
        ({"against": None}, "against"),
    ):
        with pytest.raises(RecipeError, match=told):
            knockout(merged, {"all": prompts}, finished, **{**how, **more})


def test_groups_strides_and_thirds() -> None:
    def where(layers: Sequence[int] | None, stride: int | None, group: int, depth: int = 8) -> list[str]:
        return [layer_words(cell.layers) for cell in make_cells(("mlp",), layers, stride, group, depth)]

    assert where(None, None, 1) == ["0", "1", "2", "3", "4", "5", "6", "7"]
    assert where(None, 3, 1) == ["0", "3", "6"]
    assert where(None, None, 3) == ["0-2", "3-5", "6-7"]
    assert where(None, 2, 4) == ["0-3", "2-5", "4-7"]
    assert where((1, 2, 3, 6), 2, 1) == ["1", "3"]
    assert where((7, 1, 2), None, 3) == ["1-2,7"]
    assert [third_of((layer,), 4) for layer in range(4)] == ["early", "middle", "middle", "late"]
    counts = [
        tuple(len(layers_in(third, depth)) for third in ("early", "middle", "late")) for depth in (1, 2, 3, 28, 32)
    ]
    assert counts == [(0, 1, 0), (1, 0, 1), (1, 1, 1), (9, 10, 9), (11, 10, 11)]
    assert third_of((0, 1, 2, 3), 4) == "middle"


def test_the_shares_of_the_thirds_add_up_to_one() -> None:
    cells = [Cell("mlp", (layer,)) for layer in range(4)]
    right = [(1.0,) * 40, (0.0,) * 20 + (1.0,) * 20, (1.0,) * 40, (0.0, 1.0) * 20, (1.0,) * 30 + (0.0,) * 10]
    marks = [Score(100 * sum(one) / 40, one) for one in right]
    found = drops(marks[0], marks[1:], "task", 1)
    told = thirds(found, cells, 4)
    assert [one.drop for one in (told.early, told.middle, told.late)] == [50, 50, 25]
    assert [one.share for one in (told.early, told.middle, told.late)] == [0.4, 0.4, 0.2]
    assert told.middle.mean == 25
    for one in (told.early, told.middle, told.late):
        assert one.share_interval is not None
        assert one.share is not None
        low, high = one.share_interval
        assert low < one.share < high
    again = drops(marks[0], marks[1:], "task", 1)
    assert again.resampled is not None
    assert found.resampled is not None
    assert (again.resampled == found.resampled).all()
    assert (drops(marks[0], marks[1:], "task", 2).resampled != found.resampled).any()
    # the resamples spread as the mean of 40 answers does
    assert float(found.resampled[:, 0].std()) == pytest.approx(100 * (0.25 / 40) ** 0.5, rel=0.1)


def test_shares_of_the_demo_add_up_to_one(finished: Path) -> None:
    for line in outcome(finished)["summary"]:
        for who in ("model", "against"):
            shares = [line[who][third]["share"] for third in ("early", "middle", "late")]
            if line[who]["drop"] > 0:
                assert sum(shares) == pytest.approx(1)
            else:
                assert shares == [None] * 3
    assert any(line["model"]["drop"] > 0 for line in outcome(finished)["summary"])


def test_a_score_that_is_no_mean_has_no_interval() -> None:
    found = drops(Score(50.0, None), [Score(20.0, None)], "captions", 1)
    told = thirds(found, [Cell("mlp", (0,))], 4)
    assert told.early.share == 1
    assert told.early.share_interval is None
    assert told.interval is None


def test_mistakes_of_the_command_line_are_told_with_those_of_the_run(prompts: Path, tmp_path: Path) -> None:
    twice = ("--tasks", f"{prompts}:exact,{prompts}:exact", "-o", tmp_path / "run")
    ran = cli("knockout", tmp_path / "nowhere", "--stride", "0", *twice)
    for told in ("there is a task 'prompts' already", "nowhere", "--stride: 0 is not at least 1"):
        assert told in ran.err, told
    ran = cli("ablate", tmp_path / "nowhere.yaml", "--ranges", "x", *twice)
    assert (ran.status, "there is a task 'prompts' already" in ran.err) == (2, True)
    assert "no such recipe" in ran.err
    ran = cli("knockout", VLM, *twice)
    assert (ran.status, (tmp_path / "run").exists()) == (2, False)


def test_every_mistake_is_told_at_once_and_nothing_is_made(prompts: Path, tmp_path: Path) -> None:
    lines = [json.loads(line) for line in prompts.read_text(encoding="utf-8").splitlines()]
    for line in lines:
        line["image"] = str(prompts.parent / line["image"])
    del lines[3]["answer"]
    unanswered = tmp_path / "unanswered.jsonl"
    unanswered.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    deeper = build("llava", tmp_path / "deeper")
    with pytest.raises(Refused) as refused:
        knockout(
            VLM, {"a": prompts, "b": unanswered, "c": tmp_path / "nowhere.jsonl", "/": prompts}, tmp_path / "run",
            scorer="exct", against=deeper, replace=Replacement("from", str(tmp_path / "gone"), 2.0),
            modules=("attenton", "mlp"), layers=range(10), stride=0,
            generation=Generation(batch_size=0, dtype="float"),
        )  # fmt: skip
    told = str(refused.value)
    for word in (
        "scorer: there is no scorer 'exct'. Did you mean 'exact'",
        "1 of 24 prompts have no answer, the first of them 3", "nowhere.jsonl: there is no such file",
        "'/' is no name for a task", "modules: there is no module 'attenton'. Did you mean 'attention'",
        "layers: there is no layer 4-9, the model has 0-3", "stride: 0", "batch_size: 0", "dtype",
        "noise_size: only noise has a size", "against: the two have unequally many layers", "replace from:", "gone",
    ):  # fmt: skip
        assert word in told, word
    assert refused.value.exit_status == 2
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ({"replace": Replacement("unifrm")}, "Did you mean 'uniform'"),
        ({"replace": Replacement("zero", "x")}, "replace: 'zero:x' cannot take the place"),
        ({"replace": Replacement("from")}, "Say from:CHECKPOINT"),
        ({"replace": Replacement("noise", size=0.0)}, "is not above 0"),
        ({"replace": Replacement(seed=-1)}, "seed: -1"),
        ({"layers": (1, 0, 1, 2)}, "1 said twice"),
        ({"group": 0}, "group: 0"),
        ({"samples": -1}, "no number of prompts"),
    ],
)
def test_what_cannot_be_knocked_out(how: dict[str, Any], told: str, prompts: Path, tmp_path: Path) -> None:
    with pytest.raises(Refused, match=re.escape(told)):
        knockout(VLM, {"prompts": prompts}, tmp_path / "run", **{"scorer": "exact", **how})
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_that_does_not_fit_is_refused_as_a_parent(prompts: Path, tmp_path: Path) -> None:
    other = build("llama", tmp_path / "other", layers=4)
    with pytest.raises(Refused, match=r"replace from:.*other"):
        knockout(VLM, {"prompts": prompts}, tmp_path / "run", scorer="exact", replace=Replacement("from", str(other)))
    qwen = build("qwen2", tmp_path / "qwen")
    with pytest.raises(Refused, match=r"replace from:.*qwen"):
        knockout(VLM, {"prompts": prompts}, tmp_path / "run", scorer="exact", replace=Replacement("from", str(qwen)))


def test_models_that_have_no_layers_to_knock_out(prompts: Path, tmp_path: Path) -> None:
    folder = tmp_path / "unknown"
    folder.mkdir()
    save_file({"a.weight": torch.zeros(2, 2)}, folder / "model.safetensors")
    (folder / "config.json").write_text('{"model_type": "nobody knows"}')
    with pytest.raises(Refused, match="whose tensors are not known by layer"):
        knockout(folder, {"prompts": prompts}, tmp_path / "run", scorer="exact")
    with pytest.raises(Refused, match="nowhere"):
        knockout(tmp_path / "nowhere", {"prompts": prompts}, tmp_path / "run", scorer="exact")


def test_tasks_are_said_as_for_evaluate(prompts: Path, tmp_path: Path) -> None:
    other = prompts.with_name("other.jsonl")
    shutil.copy(prompts, other)
    more = ("--samples", "4", "--max-new-tokens", "3", "--layers", "0", "--modules", "mlp")
    ran = cli("knockout", VLM, "--tasks", f"{prompts}:exact,{other}:exact", "-o", tmp_path / "run", *more)
    assert ran.status == 0, ran.err
    found = json.loads((tmp_path / "run" / "knockout.json").read_text(encoding="utf-8"))
    assert (set(found["tasks"]), found["scorer"]) == ({prompts.stem, "other"}, "exact")
    for words, told in (
        (("--tasks", f"{prompts}:exact,{other}:vqa"), "one for all tasks: they are exact, vqa"),
        (("--tasks", "mm-mergebench"), "'mm-mergebench' is not FILE:SCORER"),
        (("--prompts", prompts), "say --scorer NAME"),
        ((), "say what to ask"),
        (
            ("--prompts", f"a={prompts}", "--tasks", f"{prompts}:exact", "--prompts", prompts),
            "is a task 'prompts' already",
        ),
        (("--prompts", prompts, "--scorer", "exact", "--layers", "0-9,x"), "'x' is no layer and no range of layers"),
        (("--prompts", prompts, "--scorer", "exact", "--layers", "3-1"), "'3-1' ends before it starts"),
        (("--prompts", prompts, "--scorer", "exact", "--noise-size", "2"), "--noise-size: only noise has a size"),
        (("--prompts", prompts, "--scorer", "exact", "--modules", "mpl,mlp"), "--modules: there is no module 'mpl'"),
    ):
        ran = cli("knockout", VLM, *more, *words, "-o", tmp_path / "other")
        assert ran.status == 2
        assert told in ran.err
