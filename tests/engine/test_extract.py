"""A LoRA of a fine-tune: what PEFT loads, what folding it gives back, and what is refused."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

import polymerge as pm
from adapters_made import PEFT_WARNINGS, PREFIX, config, record, tensors
from folded import SAME_LOGITS, SAME_WEIGHTS, trained
from killed_merge import killed
from polymerge.engine import differences, finished
from polymerge.errors import CheckpointError, PolymergeError, RecipeError
from running import checkpoint, cli, fold, killed_in_the_middle, leftovers, raw, small_llama, with_config
from tiny import as_2024, as_live, build, load, loaded, logits, perturbed

pytestmark = PEFT_WARNINGS

LAYOUTS: dict[str, Callable[[Path], Path]] = {"": lambda folder: folder, "2024": as_2024, "live": as_live}
DECODER = "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"


def with_peft(base: Path, adapter: Path) -> dict[str, Tensor]:
    """Every parameter of the base with an adapter merged in by PEFT."""
    merged = PeftModel.from_pretrained(loaded(base), adapter).merge_and_unload()
    return {name: tensor.clone() for name, tensor in merged.state_dict().items()}


def of_text(name: str) -> bool:
    return name.endswith(tuple(f"{end}.weight" for end in DECODER)) and "vision" not in name


# --- what comes out


MODELS = [
    ("llava", "", "2024"), ("llava", "2024", "live"), ("llava_onevision", "live", ""), ("qwen2_vl", "", "live"),
    ("idefics2", "", ""), ("llama", "", ""),
]  # fmt: skip


@pytest.mark.parametrize(("family", "layout", "tuned_layout"), MODELS)
def test_the_adapter_that_was_trained_comes_out_again(
    family: str, layout: str, tuned_layout: str, tmp_path: Path
) -> None:
    """A fine-tune of rank 3, its base, and names of two generations: out comes the adapter that PEFT had trained."""
    base = build(family, tmp_path / "base", dtype="float32")
    case = trained(base, tmp_path / "trained")
    tuned = LAYOUTS[tuned_layout](fold(base, tmp_path / "trained", tmp_path / "tuned"))
    LAYOUTS[layout](base)
    found = pm.extract(tuned, tmp_path / "adapter", base=base, rank=3, parts=("text", "vision", "projector"))
    assert found.verification is not None
    assert next(one for one in found.verification.findings if one.check == "loads").passed
    assert set(found.modules) == {
        name.partition(".lora_A")[0] for name in tensors(tmp_path / "trained") if "_A" in name
    }
    assert found.error < 1e-5
    assert found.left_out == {}
    assert found.held == 1
    torch.testing.assert_close(with_peft(base, tmp_path / "adapter"), case.after, **SAME_WEIGHTS)
    out = fold(base, tmp_path / "adapter", tmp_path / "out")
    model = loaded(out)
    torch.testing.assert_close(dict(model.state_dict()), case.after, **SAME_WEIGHTS)
    torch.testing.assert_close(logits(model, out), case.says, **SAME_LOGITS)


def test_what_the_rank_leaves_out_is_what_the_svd_says(tmp_path: Path) -> None:
    base = build("llava", tmp_path / "base", dtype="bfloat16")
    tuned = perturbed(base, tmp_path / "tuned", seed=3)
    found = pm.extract(tuned, tmp_path / "adapter", base=base, rank=4)
    before, after, merged = loaded(base).state_dict(), loaded(tuned).state_dict(), with_peft(base, tmp_path / "adapter")
    lost = whole = 0.0
    for module, one in found.modules.items():
        name = f"{module}.weight"
        delta = after[name].double() - before[name].double()
        s = torch.linalg.svdvals(delta)
        assert one.rank == 4
        assert one.norm == pytest.approx(float(s.norm()), rel=1e-6)
        assert one.error == pytest.approx(float(s[4:].norm() / s.norm()), rel=1e-6)
        assert float((merged[name].double() - after[name].double()).norm()) == pytest.approx(
            one.error * one.norm, rel=1e-4
        )
        lost, whole = lost + float((s[4:] ** 2).sum()), whole + float((s**2).sum())
    assert len(found.modules) == 14
    assert found.error == pytest.approx((lost / whole) ** 0.5, rel=1e-6)
    outside = sum(float((after[name].double() - before[name].double()).square().sum()) for name in after) - whole
    assert found.held == pytest.approx(whole / (whole + outside), rel=1e-5)
    said = record(tmp_path / "adapter")
    assert said["output"]["error"] == found.error
    assert said["output"]["modules"] == {name: one.to_json() for name, one in found.modules.items()}
    assert said["extract"] == {"rank": 4, "parts": ["text"], "dtype": "float32"}
    assert [entry["role"] for entry in said["inputs"]] == [["tuned"], ["base"]]
    assert all(len(digest) == 64 for entry in said["inputs"] for digest in entry["sha256"].values())
    assert not list((tmp_path / "adapter").glob("factors*"))


def test_each_module_has_the_rank_of_its_energy(tmp_path: Path) -> None:
    base = build("llama", tmp_path / "base", dtype="float32")
    tuned = perturbed(base, tmp_path / "tuned", seed=3)
    found = pm.extract(tuned, tmp_path / "adapter", base=base, energy=0.8, max_rank=9)
    before, after = load(base), load(tuned)
    for module, one in found.modules.items():
        s = torch.linalg.svdvals(after[f"{module}.weight"].double() - before[f"{module}.weight"].double())
        shares = torch.cumsum(s**2, 0) / (s**2).sum()
        assert one.rank == min(9, 1 + int((shares < 0.8).sum()))
    ranks = [one.rank for one in found.modules.values()]
    assert len(set(ranks)) > 1
    assert max(ranks) == 9
    said = config(tmp_path / "adapter")
    assert said["r"] == said["lora_alpha"] == max(set(ranks), key=ranks.count)
    assert len(said["rank_pattern"]) == len(said["alpha_pattern"]) == sum(rank != said["r"] for rank in ranks)
    assert said["target_modules"] == sorted(DECODER)
    merged = with_peft(base, tmp_path / "adapter")
    for module, one in found.modules.items():
        name = f"{module}.weight"
        left = float((merged[name] - after[name]).norm() / (after[name] - before[name]).norm())
        assert left == pytest.approx(one.error, rel=1e-4)
    folded = load(fold(base, tmp_path / "adapter", tmp_path / "out"))
    torch.testing.assert_close({name: folded[name] for name in merged if of_text(name)},
                               {name: merged[name] for name in merged if of_text(name)}, **SAME_WEIGHTS)  # fmt: skip


def test_a_module_that_does_not_differ_is_no_part_of_it(tmp_path: Path) -> None:
    base = build("llava", tmp_path / "base", dtype="float32")
    trained(base, tmp_path / "trained", target_modules=r".*language_model.*layers\.1\..*(q|k)_proj")
    tuned = fold(base, tmp_path / "trained", tmp_path / "tuned")
    found = pm.extract(tuned, tmp_path / "adapter", base=base, rank=2)
    assert sorted(name.rpartition("layers.")[2] for name in found.modules) == [
        "1.self_attn.k_proj",
        "1.self_attn.q_proj",
    ]
    # `q_proj` alone would be the vision tower's as well
    assert config(tmp_path / "adapter")["target_modules"] == sorted(found.modules)


@pytest.mark.parametrize("tie", [False, True])
def test_everything_that_differs_can_be_kept(tie: bool, tmp_path: Path) -> None:
    """At full rank, with what is not linear kept in full, the fine-tune comes back whole."""
    base = build("qwen2_vl", tmp_path / "base", dtype="float32", tie=tie)
    tuned = perturbed(base, tmp_path / "tuned", seed=3)
    found = pm.extract(
        tuned, tmp_path / "adapter", base=base, rank=99, parts=("text", "vision", "projector"),
        save=("*norm*", "*.bias", "text.embed_tokens.weight", "text.lm_head.weight", "*patch_embed*"),
    )  # fmt: skip
    assert found.left_out == {}
    assert found.error < 1e-6
    assert any(name.endswith("q_proj.bias") for name in found.saved)
    assert any(name.endswith("norm.weight") for name in found.saved)
    assert config(tmp_path / "adapter")["bias"] == "lora_only"
    wanted = loaded(tuned).state_dict()
    out = fold(base, tmp_path / "adapter", tmp_path / "out")
    model = loaded(out)
    torch.testing.assert_close(dict(model.state_dict()), dict(wanted), rtol=0, atol=1e-6)
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tie
    with_adapter = PeftModel.from_pretrained(loaded(base), tmp_path / "adapter")
    torch.testing.assert_close(logits(with_adapter, base), logits(loaded(tuned), tuned), **SAME_LOGITS)


def test_a_fine_tune_with_more_tokens(tmp_path: Path) -> None:
    base = build("llama", tmp_path / "base", dtype="float32")
    tuned = perturbed(build("llama", tmp_path / "tuned", dtype="float32", vocab=70), tmp_path / "tuned", seed=3)
    with pytest.raises(PolymergeError) as error:
        pm.extract(tuned, tmp_path / "adapter", base=base, rank=2)
    assert len(error.value.problems) == 2
    assert "text.embed_tokens.weight: 'tuned' is [70, 32], base 'base' is [64, 32]. Say save: " in str(error.value)
    kept = {"save": ("text.embed_tokens.weight", "text.lm_head.weight")}
    found = pm.extract(tuned, tmp_path / "adapter", base=base, rank=99, **kept)
    assert set(found.saved) == {"model.embed_tokens.weight", "lm_head.weight"}
    out = fold(base, tmp_path / "adapter", tmp_path / "out")
    assert json.loads((out / "config.json").read_text())["vocab_size"] == 70
    there, here = load(tuned), load(out)
    assert torch.equal(here["lm_head.weight"], there["lm_head.weight"])
    assert pm.extract(tuned, tmp_path / "less", base=base, rank=2, exclude=("text.embed_*", "*lm_head*")).saved == ()


def test_layers_whose_columns_are_rows(tmp_path: Path) -> None:
    """GPT-2's Conv1D, which PEFT knows as `fan_in_fan_out`."""
    torch.manual_seed(0)
    small = GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=20, n_positions=16, bos_token_id=0, eos_token_id=1)
    GPT2LMHeadModel(small).save_pretrained(tmp_path / "base")
    tuned = perturbed(tmp_path / "base", tmp_path / "tuned", seed=1)
    found = pm.extract(tuned, tmp_path / "adapter", base=tmp_path / "base", rank=99)
    assert len(found.modules) == 8
    assert config(tmp_path / "adapter")["fan_in_fan_out"] is True
    base = GPT2LMHeadModel.from_pretrained(tmp_path / "base")
    merged = PeftModel.from_pretrained(base, tmp_path / "adapter").merge_and_unload().state_dict()
    wanted = GPT2LMHeadModel.from_pretrained(tuned).state_dict()
    out = GPT2LMHeadModel.from_pretrained(fold(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")).state_dict()
    for module in found.modules:
        torch.testing.assert_close(merged[f"{module}.weight"], wanted[f"{module}.weight"], **SAME_WEIGHTS)
        torch.testing.assert_close(out[f"{module}.weight"], wanted[f"{module}.weight"], **SAME_WEIGHTS)


@pytest.mark.parametrize(
    ("family", "prefix"), [("internvl_chat", "language_model.model.layers."), ("llava_original", "model.layers.")]
)
def test_a_class_that_transformers_has_not(family: str, prefix: str, tmp_path: Path) -> None:
    base = build(family, tmp_path / "base", dtype="float32")
    tuned = perturbed(base, tmp_path / "tuned", seed=3)
    found = pm.extract(tuned, tmp_path / "adapter", base=base, rank=99)
    assert any("has the names of its tensors as stored" in note for note in found.warnings)
    assert len(found.modules) == 14
    assert all(name.startswith(prefix) for name in found.modules)
    there, here = load(tuned), load(fold(base, tmp_path / "adapter", tmp_path / "out"))
    for module in found.modules:
        torch.testing.assert_close(here[f"{module}.weight"], there[f"{module}.weight"], **SAME_WEIGHTS)


def test_the_text_tower_of_a_vlm_against_a_language_model(tmp_path: Path) -> None:
    """An adapter that a language model takes, of what a VLM's training did to it."""
    from tiny import related_llm

    vlm = build("llava", tmp_path / "vlm", dtype="float32")
    llm = related_llm(vlm, tmp_path / "llm")
    found = pm.extract(vlm, tmp_path / "adapter", base=llm, rank=99)
    assert len(found.modules) == 14
    there = load(vlm)
    here = load(fold(llm, tmp_path / "adapter", tmp_path / "out"))
    for module in found.modules:
        wanted = there[f"language_model.{module}.weight"]
        torch.testing.assert_close(here[f"{module}.weight"], wanted, **SAME_WEIGHTS)
    back = pm.extract(llm, tmp_path / "back", base=vlm, rank=2)
    assert "'llm' has no vision, projector: only what both have is compared" in back.warnings


def test_a_model_with_an_adapter_is_a_fine_tune(tmp_path: Path) -> None:
    base = build("llama", tmp_path / "base", dtype="float32")
    case = trained(base, tmp_path / "trained")
    pm.extract(f"{base}+{tmp_path / 'trained'}", tmp_path / "adapter", base=base, rank=3)
    torch.testing.assert_close(with_peft(base, tmp_path / "adapter"), case.after, **SAME_WEIGHTS)


def test_the_fine_tune_s_tokenizer_comes_along_if_it_is_another(tmp_path: Path) -> None:
    base = build("llama", tmp_path / "base")
    tuned = perturbed(base, tmp_path / "tuned", seed=3)
    pm.extract(tuned, tmp_path / "same", base=base, rank=1)
    assert not list((tmp_path / "same").glob("tokenizer*"))
    (tuned / "chat_template.jinja").write_text("{{ messages }}")
    with_template = pm.extract(tuned, tmp_path / "other", base=base, rank=1).folder
    assert (with_template / "chat_template.jinja").read_text() == "{{ messages }}"
    assert not list((tmp_path / "other").glob("tokenizer*"))
    out = fold(base, with_template, tmp_path / "out")
    assert (out / "chat_template.jinja").read_text() == "{{ messages }}"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_factors_in_another_dtype(dtype: str, tmp_path: Path) -> None:
    base = build("llama", tmp_path / "base", dtype="float32")
    tuned = perturbed(base, tmp_path / "tuned", seed=3)
    found = pm.extract(tuned, tmp_path / "adapter", base=base, rank=99, dtype=dtype)
    held = tensors(tmp_path / "adapter")
    assert {str(tensor.dtype) for tensor in held.values()} == {f"torch.{dtype}"}
    module, one = next(iter(found.modules.items()))
    a, b = (held[f"{module}.lora_{side}.weight"].double() for side in "AB")
    delta = load(tuned)[f"{module}.weight"].double() - load(base)[f"{module}.weight"].double()
    # the error is that of what is written
    assert one.error == pytest.approx(float((delta - b @ a).norm() / delta.norm()), rel=1e-3, abs=1e-7)
    assert (one.error > 1e-5) == (dtype != "float64")


def test_the_same_bits_whatever_the_threads(tmp_path: Path) -> None:
    base = build("llava", tmp_path / "base")
    tuned = perturbed(base, tmp_path / "tuned", seed=3)
    for threads in (1, 4):
        pm.extract(tuned, tmp_path / f"{threads}", base=base, energy=0.7, threads=threads, save=("*norm*",))
    assert raw(tmp_path / "1") == raw(tmp_path / "4")


# --- what is refused


def refused(tmp_path: Path, tuned: object, base: object, **options: Any) -> str:
    with pytest.raises((RecipeError, CheckpointError, PolymergeError)) as error:
        pm.extract(str(tuned), tmp_path / "adapter", base=str(base), **options)
    assert not (tmp_path / "adapter").exists()
    assert not leftovers(tmp_path)
    return str(error.value)


def test_settings_that_cannot_be(tmp_path: Path) -> None:
    base = build("llama", tmp_path / "base")
    tuned = perturbed(base, tmp_path / "tuned", seed=3)
    for options, words in {
        (): "`rank`, or `energy`",
        (("rank", 2), ("energy", 0.5)): "`rank`, or `energy`",
        (("rank", 0),): "rank: 0 is not at least 1",
        (("energy", 1.5),): "energy: 1.5 is no share",
        (("energy", 0.5), ("max_rank", 0)): "max_rank: 0 is not at least 1",
        (("rank", 2), ("parts", ("vison",))): "there is no part 'vison'. Did you mean 'vision'",
        (("rank", 2), ("parts", ("vision",))): "no linear layers among the tensors that are asked for",
        (("rank", 2), ("dtype", "int8")): "dtype: 'int8' cannot be written",
        (("rank", 2), ("match", ("text.laayers*",))): "match: 'text.laayers*' matches no tensor",
        (("rank", 2), ("match", ("text.norm.weight",))): "matches no linear layer: text.norm.weight",
        (("rank", 2), ("save", ("nothing",))): "save: 'nothing' matches no tensor",
        (("rank", 2), ("exclude", ("nothing",))): "exclude: 'nothing' matches no tensor",
    }.items():
        assert words in refused(tmp_path, tuned, base, **dict(options)), words


def test_models_that_do_not_fit(tmp_path: Path) -> None:
    base = build("llama", tmp_path / "base")
    tuned = perturbed(base, tmp_path / "tuned", seed=3)
    assert "are one and the same model" in refused(tmp_path, base, base, rank=2)
    assert "there is no such file or folder" in refused(tmp_path, tmp_path / "none", base, rank=2)
    deeper = build("llama", tmp_path / "deeper", layers=3)
    assert "base 'base' has it, 'deeper' does not" not in refused(tmp_path, tuned, deeper, rank=2)
    assert "'tuned' does not. Name the base that it was tuned from" in refused(tmp_path, tuned, deeper, rank=2)
    wider = build("llama", tmp_path / "keys", keys=4)
    said = refused(tmp_path, tuned, wider, rank=2)
    assert "k_proj.weight (2 tensors): 'tuned' is [16, 32], base 'keys' is [32, 32]" in said
    gptq = {"quant_method": "gptq", "bits": 4}
    quantized = checkpoint(
        tmp_path / "gptq", {"model.layers.0.mlp.up_proj.qweight": torch.zeros(4, 4, dtype=torch.int32)}
    )
    assert "quantized" in refused(tmp_path, with_config(quantized, quantization_config=gptq), base, rank=2)


def test_no_difference_at_all(tmp_path: Path) -> None:
    base = build("llama", tmp_path / "base")
    same = perturbed(base, tmp_path / "same", seed=3, size=0.0)
    said = refused(tmp_path, same, base, rank=2)
    assert "'same' does not differ from its base 'base' in any of the 14 linear layers" in said
    assert "What differs" not in said
    file = same / "model.safetensors"
    held = load_file(file)
    save_file(held | {"model.norm.weight": held["model.norm.weight"] + 1}, file, {"format": "pt"})
    assert "What differs: text.norm.weight" in refused(tmp_path, same, base, energy=0.9)


def test_numbers_that_are_none(tmp_path: Path) -> None:
    base = checkpoint(tmp_path / "base", small_llama(1))
    held = small_llama(2)
    held["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    tuned = checkpoint(tmp_path / "tuned", held)
    assert "holds NaN or infinity" in refused(tmp_path, tuned, base, rank=2)
    large = {name: tensor.float() * 1e25 for name, tensor in small_llama(2).items()}
    tuned = checkpoint(tmp_path / "large", large)
    assert "too large for F16. Say dtype: float32" in refused(tmp_path, tuned, base, rank=2, dtype="float16")


def test_the_output_s_place(tmp_path: Path) -> None:
    base = build("llama", tmp_path / "base")
    tuned = perturbed(base, tmp_path / "tuned", seed=3)
    (tmp_path / "adapter").mkdir()
    with pytest.raises(PolymergeError, match="exists"):
        pm.extract(tuned, tmp_path / "adapter", base=base, rank=2)
    with pytest.raises(PolymergeError, match="would be replaced"):
        pm.extract(tuned, tuned, base=base, rank=2, force=True)
    assert pm.extract(tuned, tmp_path / "adapter", base=base, rank=2, force=True).folder == tmp_path / "adapter"


def test_killed_in_the_middle(tmp_path: Path) -> None:
    base = build("llava", tmp_path / "base", layers=6)
    tuned = perturbed(base, tmp_path / "tuned", seed=3)
    out, program = tmp_path / "adapter", Path(sys.executable).with_name("polymerge")
    words = ["extract", tuned, "--base", base, "--rank", 4, "-o", out]
    work = tmp_path / ".adapter.polymerge-partial"
    killed_in_the_middle([program, *words], (work / "factors").exists)
    assert not out.exists()
    assert work.exists()
    ran = cli(*words)
    assert ran.status == 0, ran.err
    assert not leftovers(tmp_path)
    pm.extract(tuned, tmp_path / "calm", base=base, rank=4)
    assert raw(out) == raw(tmp_path / "calm")


@pytest.mark.parametrize("options", [{"rank": 4}, {"energy": 0.8, "save": ["*norm*"]}])
@pytest.mark.parametrize(("calls", "threads"), [(1, 1), (9, 1), (14, 1), (9, 3)])
def test_an_extraction_that_was_killed_goes_on(
    calls: int, threads: int, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = build("llama", tmp_path / "base")
    tuned = perturbed(base, tmp_path / "tuned", seed=3)
    called, leading = list[int](), differences.leading
    monkeypatch.setattr(differences, "leading", lambda *said: called.append(1) or leading(*said))
    monkeypatch.setattr(finished, "YOUNG", 0)
    asked: dict[str, Any] = {"tuned": str(tuned), "base": str(base), **options}
    calm = pm.extract(**asked, out=tmp_path / "calm", check=False)
    assert (len(called), calm.resumed) == (14, 0)
    work = killed(asked, tmp_path / "adapter", calls, threads)
    called.clear()
    found = pm.extract(**asked, out=tmp_path / "adapter", check=False)
    assert raw(tmp_path / "adapter") == raw(tmp_path / "calm")
    assert (found.modules, found.saved, found.left_out) == (calm.modules, calm.saved, calm.left_out)
    assert config(tmp_path / "adapter") == config(tmp_path / "calm")
    assert found.resumed == 14 - len(called)
    assert found.resumed == calls - 1 if threads == 1 else found.resumed <= calls - 1
    assert not work.exists()


@pytest.mark.parametrize("change", ["rank", "fine-tune", "factors", "journal"])
def test_modules_of_another_state_are_extracted_anew(
    change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = build("llama", tmp_path / "base")
    tuned = perturbed(base, tmp_path / "tuned", seed=3)
    monkeypatch.setattr(finished, "YOUNG", 0)
    asked: dict[str, Any] = {"tuned": str(tuned), "base": str(base), "rank": 4}
    work = killed(asked, tmp_path / "adapter", 9)
    if change == "rank":
        asked["rank"] = 3
    elif change == "fine-tune":
        file = tuned / "model.safetensors"
        save_file({name: tensor * 2 for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    elif change == "factors":
        (work / "factors").write_bytes(b"")
    else:
        (work / "finished").write_bytes((work / "finished").read_bytes()[:-9])
    found = pm.extract(**asked, out=tmp_path / "adapter", check=False)
    assert found.resumed == {"journal": 7}.get(change, 0)
    pm.extract(**asked, out=tmp_path / "calm", check=False)
    assert raw(tmp_path / "adapter") == raw(tmp_path / "calm")


# --- the command line


def test_what_the_command_prints(tmp_path: Path) -> None:
    base = build("llava", tmp_path / "base")
    tuned = perturbed(base, tmp_path / "tuned", seed=3)
    out = tmp_path / "adapter"
    ran = cli("extract", tuned, "--base", base, "--energy", 0.9, "--max-rank", 12, "-o", out)
    assert ran.status == 0, ran.err
    lines = ran.out.splitlines()
    assert lines[0].split() == ["module", "count", "rank", "left", "out,", "mean", "at", "most"]
    assert "model.language_model.layers.{i}.self_attn.q_proj" in ran.out
    assert f"{out}: 14 modules" in ran.out
    assert "not in the adapter: 50 other tensors differ" in ran.out
    assert "loads       ok" in ran.out
    assert len(cli("extract", tuned, "--base", base, "--rank", 1, "-o", out, "--force", "--full").out.splitlines()) > 14
    ran = cli("extract", tuned, "--base", base, "--rank", 2, "-o", out, "--force", "--json", "--save", "*norm*")
    said = json.loads(ran.out)
    assert set(said) >= {"out", "error", "modules", "saved", "left_out", "share_of_difference", "verification"}
    assert len(said["saved"]) > 0
    held = set(load_file(out / "adapter_model.safetensors"))
    assert {PREFIX + name for name in said["saved"]} < held
    np.testing.assert_allclose([one["rank"] for one in said["modules"].values()], 2)


def test_a_command_line_that_cannot_be(tmp_path: Path) -> None:
    base = build("llama", tmp_path / "base")
    tuned = perturbed(base, tmp_path / "tuned", seed=3)
    ran = cli("extract", tuned, "--base", base, "--rank", 2, "--max-rank", 3, "--parts", "txt", "-o", tmp_path / "out")
    assert ran.status == 2
    assert "2 problems" in ran.err
    assert "--max-rank is for --energy" in ran.err
    assert cli("extract", tuned, "-o", tmp_path / "out").status == 2
