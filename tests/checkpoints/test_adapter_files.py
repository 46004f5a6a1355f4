"""What lies in an adapter's folder beside its factors: weight files are read or named, and a tokenizer is its own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import adapters_made
from adapters_made import PEFT_WARNINGS, PREFIX
from folded import SAME_WEIGHTS, Trained, check, trained
from polymerge import plan as make_plan
from polymerge.checkpoints.adapter import is_adapter, open_adapter
from polymerge.checkpoints.loading import load_model
from polymerge.errors import CheckpointError
from polymerge.inference.live import LiveModel
from polymerge.planning import Plan
from running import checkpoint, cli, fold, merged, raw, recipe_file, small_llama
from tiny import build, loaded

pytestmark = PEFT_WARNINGS

MODEL = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A LLaVA with an adapter that PEFT saved together with a projector trained in full."""
    folder = tmp_path_factory.mktemp("case")
    base = build("llava", folder / "base", dtype="float32")
    return trained(base, folder / "adapter", modules_to_save=["multi_modal_projector"])


def apart(case: Trained, folder: Path) -> dict[str, Tensor]:
    """A copy of the adapter without the projector, which is returned."""
    copytree(case.adapter, folder)
    held = load_file(folder / MODEL)
    save_file({name: tensor for name, tensor in held.items() if ".lora_" in name}, folder / MODEL)
    settings = json.loads((folder / "adapter_config.json").read_text()) | {"modules_to_save": None}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return {name: tensor for name, tensor in held.items() if ".lora_" not in name}


def write(tensors: dict[str, Tensor], file: Path) -> None:
    if file.suffix == ".safetensors":
        save_file(tensors, file)
    else:
        torch.save(tensors, file)


# --- full weights under any name


@pytest.mark.parametrize(
    ("name", "prefix"),
    [
        ("non_lora_trainables.bin", PREFIX),
        ("non_lora_trainables.safetensors", PREFIX),
        ("non_lora_state_dict.bin", PREFIX),
        ("trainable_params.bin", ""),
        ("mm_projector.bin", ""),
        ("vit.safetensors", ""),
        ("additional_weights.pt", "module." + PREFIX),
        ("full.pth", "_orig_mod." + PREFIX),
    ],
)
def test_full_weights_under_any_name(name: str, prefix: str, case: Trained, tmp_path: Path) -> None:
    projector = apart(case, tmp_path / "adapter")
    write({prefix + key.removeprefix(PREFIX): tensor for key, tensor in projector.items()}, tmp_path / "adapter" / name)
    changed = check(case, fold(case.base, tmp_path / "adapter", tmp_path / "out"))
    assert sum("projector" in one for one in changed) == len(projector) == 4
    said = cli("inspect", tmp_path / "adapter").out
    assert f"  {name}: 4 full weights" in said
    assert f"  {MODEL}: " in said
    planned = cli("fold", tmp_path / "adapter", "--base", case.base, "--dry-run").out
    assert f"    {name}: 4 full weights" in planned


def test_full_weights_in_two_files(case: Trained, tmp_path: Path) -> None:
    projector = apart(case, tmp_path / "adapter")
    names = sorted(projector)
    write({name: projector[name] for name in names[:3]}, tmp_path / "adapter" / "mm_projector.bin")
    write({name: projector[name] for name in names[2:]}, tmp_path / "adapter" / "more.safetensors")
    check(case, fold(case.base, tmp_path / "adapter", tmp_path / "out"))  # what both hold is equal
    assert "1 that mm_projector.bin holds byte for byte" in cli("inspect", tmp_path / "adapter").out
    write({name: projector[name] + 1 for name in names[2:]}, tmp_path / "adapter" / "more.safetensors")
    ran = cli("fold", tmp_path / "adapter", "--base", case.base, "-o", tmp_path / "other")
    assert ran.status == 1
    assert "1 problem" in ran.err
    assert "more.safetensors: " in ran.err
    assert "of mm_projector.bin stand for one tensor. They are not equal: move the file" in ran.err


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
@pytest.mark.parametrize("index", [True, False])
def test_an_adapter_in_shards(suffix: str, index: bool, case: Trained, tmp_path: Path) -> None:
    copytree(case.adapter, tmp_path / "adapter")
    held = load_file(tmp_path / "adapter" / MODEL)
    (tmp_path / "adapter" / MODEL).unlink()
    names = sorted(held)
    weight_map = {}
    for number, part in ((1, names[::2]), (2, names[1::2])):
        shard = f"adapter_model-0000{number}-of-00002.{suffix}"
        write({name: held[name] for name in part}, tmp_path / "adapter" / shard)
        weight_map |= dict.fromkeys(part, shard)
    if index:
        text = json.dumps({"metadata": {}, "weight_map": weight_map})
        (tmp_path / "adapter" / f"adapter_model.{suffix}.index.json").write_text(text)
    check(case, fold(case.base, tmp_path / "adapter", tmp_path / "out"))
    (tmp_path / "adapter" / shard).unlink()
    ran = cli("fold", tmp_path / "adapter", "--base", case.base, "-o", tmp_path / "other")
    assert ran.status == 1
    assert "1 problem" in ran.err
    assert "has 1 of 2 shards" in ran.err


def test_full_weights_of_merged_adapters(tmp_path: Path) -> None:
    """They are averaged, as those of LLaVA's file are, and PEFT has a place for them in the merged adapter."""
    heads = {}
    for seed in (1, 2):
        adapters_made.adapter(tmp_path / str(seed), seed)
        heads[seed] = torch.randn(20, 16, generator=torch.Generator().manual_seed(seed))
        write({f"{PREFIX}lm_head.weight": heads[seed]}, tmp_path / str(seed) / "non_lora_state_dict.bin")
    out = merged(adapters_made.recipe("linear", [tmp_path / "1", tmp_path / "2"], 0.5), tmp_path / "out")
    mean = (heads[1] + heads[2]) / 2
    torch.testing.assert_close(load_file(out / MODEL)[f"{PREFIX}lm_head.weight"], mean)
    model = adapters_made.loaded(out).merge_and_unload()
    torch.testing.assert_close(model.lm_head.weight.detach(), mean)


# --- files that are none of its weights


def test_what_trainers_leave_is_named(case: Trained, tmp_path: Path) -> None:
    copytree(case.adapter, tmp_path / "adapter")
    left = ("optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state_0.pth", "training_args.bin", "value_head.bin")
    for name in (*left, "pytorch_model_fsdp.bin", "model.gguf", "adapter_model.bin"):
        (tmp_path / "adapter" / name).write_bytes(b"nothing that could be read")
    ran = cli("fold", tmp_path / "adapter", "--base", case.base, "-o", tmp_path / "out")
    assert ran.status == 0, ran.err
    check(case, tmp_path / "out")
    for name in (*left, "pytorch_model_fsdp.bin", "model.gguf", "adapter_model.bin"):
        assert f"'{name}'" in ran.err
        assert f"  {name}: left out: " in cli("inspect", tmp_path / "adapter").out
    assert not {path.name for path in (tmp_path / "out").iterdir()} & {*left, "adapter_config.json", "model.gguf"}


def refused(case: Trained, adapter: Path, *words: str) -> None:
    ran = cli("fold", adapter, "--base", case.base, "-o", adapter.parent / "out")
    assert ran.status != 0
    assert "1 problem" in ran.err
    for word in words:
        assert word in ran.err


def test_a_file_that_holds_no_tensors(case: Trained, tmp_path: Path) -> None:
    copytree(case.adapter, tmp_path / "adapter")
    torch.save([1], tmp_path / "adapter" / "state.pt")
    refused(case, tmp_path / "adapter", "state.pt: holds", "move it out of the folder")


def test_a_file_with_names_that_the_base_has_not(case: Trained, tmp_path: Path) -> None:
    copytree(case.adapter, tmp_path / "adapter")
    save_file({"input_embeddings": torch.zeros(2, 2)}, tmp_path / "adapter" / "new_embeddings.safetensors")
    refused(case, tmp_path / "adapter", "new_embeddings.safetensors) has weights for input_embeddings, which its base")


def test_a_file_with_names_that_no_model_has_in_a_merge(tmp_path: Path) -> None:
    for seed in (1, 2):
        adapters_made.adapter(tmp_path / str(seed), seed)
    (tmp_path / "1" / "config.json").write_text('{"model_type": "llama"}')
    save_file({"input_embeddings": torch.zeros(2, 2)}, tmp_path / "2" / "new_embeddings.safetensors")
    ran = cli(
        "plan", recipe_file(adapters_made.recipe("linear", [tmp_path / "1", tmp_path / "2"]), tmp_path / "r.yaml")
    )
    assert ran.status == 2
    assert "1 problem" in ran.err
    assert f"'2': {tmp_path / '2' / 'new_embeddings.safetensors'}: 'input_embeddings' have names that no" in ran.err


def test_a_second_lora_beside_the_first(case: Trained, tmp_path: Path) -> None:
    copytree(case.adapter, tmp_path / "adapter")
    copied = (tmp_path / "adapter" / MODEL).read_bytes()
    (tmp_path / "adapter" / "older.safetensors").write_bytes(copied)
    refused(case, tmp_path / "adapter", "older.safetensors: holds parts of a LoRA", "Move it")


def test_an_adapter_beside_a_whole_model(tmp_path: Path) -> None:
    """Named as an adapter nothing says which is meant; named as a model it is the model, and says so."""
    base = checkpoint(tmp_path / "base", small_llama(1))
    both = checkpoint(tmp_path / "both", small_llama(2))
    module = f"{PREFIX}model.layers.0.mlp.up_proj"
    factors = {f"{module}.lora_A.weight": torch.ones(2, 6), f"{module}.lora_B.weight": torch.ones(9, 2)}
    save_file(factors, both / MODEL)
    (both / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2}))
    assert not is_adapter(both)
    joined = recipe_file({"merge_method": "copy", "models": [f"{base}+{both}"]}, tmp_path / "r.yaml")
    for words in (("fold", both, "--base", base, "-o", tmp_path / "out"), ("plan", joined)):
        ran = cli(*words)
        assert ran.status == 2
        assert "holds an adapter ('adapter_model.safetensors') and a whole model ('model.safetensors')" in ran.err
    recipe = {"merge_method": "linear", "models": [str(base), str(both)], "parameters": {"weight": 0.5}}
    recipe_file({**recipe, "template": str(both)}, tmp_path / "m.yaml")
    made = cli("merge", tmp_path / "m.yaml", "-o", tmp_path / "out", "--no-verify")
    assert made.status == 0, made.err
    assert "'both': 'adapter_config.json', 'adapter_model.safetensors' in its folder is an adapter" in made.err
    assert not (tmp_path / "out" / "adapter_config.json").exists()
    name = "model.layers.0.mlp.up_proj.weight"
    mean = (small_llama(1)[name].float() + small_llama(2)[name].float()) / 2
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")[name], mean.bfloat16())
    with pytest.raises(CheckpointError, match="lies beside the model, and transformers would load both"):
        load_model(both)


# --- what wrappers put into names

WRAPPED: dict[str, Callable[[str], str]] = {
    "compiled inside": lambda name: name.replace(PREFIX, PREFIX + "_orig_mod."),
    "compiled outside": lambda name: f"_orig_mod.{name}",
    "a part compiled": lambda name: name.replace(".self_attn", "._orig_mod.self_attn"),
    "FSDP": lambda name: name.replace("language_model.layers", "_fsdp_wrapped_module.language_model.layers"),
    "FSDP, each layer": lambda name: name.replace(".self_attn", "._fsdp_wrapped_module.self_attn"),
    "checkpointed": lambda name: name.replace(".self_attn", "._checkpoint_wrapped_module.self_attn"),
    "parallel outside": lambda name: f"module.{name}",
    "parallel inside": lambda name: name.replace(PREFIX, PREFIX + "module."),
    "adapted twice": lambda name: name.replace(PREFIX, PREFIX + PREFIX),
    "compiled and parallel": lambda name: f"module._orig_mod.{name}",
}


@pytest.mark.parametrize("rename", WRAPPED.values(), ids=WRAPPED)
def test_names_with_wrappers(rename: Callable[[str], str], case: Trained, tmp_path: Path) -> None:
    copytree(case.adapter, tmp_path / "adapter")
    held = load_file(tmp_path / "adapter" / MODEL)
    renamed = {rename(name): tensor for name, tensor in held.items()}
    assert set(renamed) != set(held)
    save_file(renamed, tmp_path / "adapter" / MODEL)
    check(case, fold(case.base, tmp_path / "adapter", tmp_path / "out"))


def test_one_name_with_a_wrapper_and_without(case: Trained, tmp_path: Path) -> None:
    copytree(case.adapter, tmp_path / "adapter")
    held = load_file(tmp_path / "adapter" / MODEL)
    first = next(name for name in held if ".lora_A." in name)
    save_file(held | {first.replace(PREFIX, PREFIX + "_orig_mod."): held[first] + 1}, tmp_path / "adapter" / MODEL)
    refused(case, tmp_path / "adapter", "stand for one tensor")


# --- values that are not there


def test_full_weights_that_were_not_gathered(case: Trained, tmp_path: Path) -> None:
    copytree(case.adapter, tmp_path / "adapter")
    held = load_file(tmp_path / "adapter" / MODEL)
    empty = {name: tensor if ".lora_" in name else torch.zeros(0) for name, tensor in held.items()}
    save_file(empty, tmp_path / "adapter" / MODEL)
    refused(
        case, tmp_path / "adapter", "it was not gathered", "stage3_gather_16bit_weights_on_model_save", "zero_to_fp32"
    )


def test_an_update_of_zeros_is_said(case: Trained, tmp_path: Path) -> None:
    copytree(case.adapter, tmp_path / "zero")
    held = load_file(tmp_path / "zero" / MODEL)
    factors = {name: tensor for name, tensor in held.items() if ".lora_" in name}
    zeros = {name: tensor * (-0.0 if ".lora_B." in name else 1) for name, tensor in factors.items()}
    save_file(zeros, tmp_path / "zero" / MODEL)
    ran = cli("fold", tmp_path / "zero", "--base", case.base, "-o", tmp_path / "out")
    assert ran.status == 0, ran.err
    says = "is all zeros, so that nothing of it comes into the output."
    assert ran.err.count(says) == 1
    assert says in json.loads((tmp_path / "out" / "polymerge.json").read_text())["output"]["warnings"][0]
    for name, tensor in loaded(tmp_path / "out").state_dict().items():
        assert torch.equal(tensor, case.before[name])
    one = next(name for name in factors if ".lora_B." in name)
    save_file(zeros | {one: factors[one]}, tmp_path / "zero" / MODEL)
    again = cli("fold", tmp_path / "zero", "--base", case.base, "-o", tmp_path / "trained")
    assert again.status == 0
    assert "all zeros" not in again.err
    assert raw(tmp_path / "trained") != raw(tmp_path / "out")


def test_an_update_of_zeros_among_merged_adapters(tmp_path: Path) -> None:
    for seed in (1, 2):
        adapters_made.adapter(tmp_path / str(seed), seed)
    held = load_file(tmp_path / "2" / MODEL)
    save_file({name: tensor * (".lora_A." in name) for name, tensor in held.items()}, tmp_path / "2" / MODEL)
    recipe = adapters_made.recipe("linear", [tmp_path / "1", tmp_path / "2"], 0.5)
    ran = cli("merge", recipe_file(recipe, tmp_path / "r.yaml"), "-o", tmp_path / "out")
    assert ran.status == 0, ran.err
    assert "note: '2': the update of its 2 modules is all zeros" in ran.err
    assert "'1': the update" not in ran.err


# --- tokenizer, chat template, processor


def tokenizer(folder: Path, *words: str, template: str | None = None) -> None:
    folder.mkdir(exist_ok=True)
    vocabulary = {word: number for number, word in enumerate(("<unk>", *words))}
    fast = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocabulary, "<unk>")), unk_token="<unk>")
    fast.chat_template = template
    fast.save_pretrained(folder)


@pytest.fixture
def plain(tmp_path: Path) -> tuple[Path, Path]:
    """A Llama with a tokenizer, and an adapter without one."""
    base = tmp_path / "base"
    adapters_made.llama().save_pretrained(base)
    tokenizer(base, "a", "b", template="the base's")
    return base, adapters_made.adapter(tmp_path / "adapter", 1)


def test_a_whole_tokenizer_is_the_adapters(plain: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = plain
    for name in ("vocab.txt", "added_tokens.json", "special_tokens_map.json"):
        (base / name).write_text("{}")
    tokenizer(adapter, "a", "<img>", "b", template="the adapter's")
    (adapter / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    (adapter / "README.md").write_text("of the adapter")
    (adapter / "train_log.txt").write_text("of the training")
    ran = cli("fold", adapter, "--base", base, "-o", tmp_path / "out")
    assert ran.status == 0, ran.err
    out = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert out.convert_tokens_to_ids(["a", "<img>", "b"]) == [1, 2, 3]
    assert out.chat_template == "the adapter's"
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == {"eos_token_id": [1, 2]}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "llama"
    held = {path.name for path in (tmp_path / "out").iterdir()}
    assert not held & {
        "vocab.txt",
        "added_tokens.json",
        "special_tokens_map.json",
        "adapter_config.json",
        "train_log.txt",
    }
    assert "of the adapter" not in (tmp_path / "out" / "README.md").read_text()
    for words in (
        "note: tokenizer: 'tokenizer.json', 'tokenizer_config.json' of the adapter 'adapter'",
        "note: chat template: 'chat_template.jinja' of the adapter",
        "note: generation config: ",
    ):
        assert words in ran.err
    made = make_plan({"merge_method": "copy", "models": [f"{base}+{adapter}"]})
    assert isinstance(made, Plan)
    assert [one.kind for one in made.companions] == ["tokenizer", "chat template", "generation config"]
    assert make_plan(json.loads(json.dumps(made.to_json()))) == made


def test_settings_without_a_vocabulary_stay_behind(plain: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = plain
    (adapter / "tokenizer_config.json").write_text('{"unk_token": "?"}')
    ran = cli("fold", adapter, "--base", base, "-o", tmp_path / "out")
    assert ran.status == 0, ran.err
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes()
    assert "note: tokenizer: the base's; 'tokenizer_config.json' of the adapter 'adapter' is left out" in ran.err


@pytest.mark.parametrize("legacy", [True, False])
def test_a_chat_template_in_the_tokenizers_config(legacy: bool, plain: tuple[Path, Path], tmp_path: Path) -> None:
    """Files of the base would come before it: transformers reads chat_template.jinja first, the .json before that."""
    base, adapter = plain
    if legacy:
        (base / "chat_template.json").write_text('{"chat_template": "the base\'s"}')
    tokenizer(adapter, "a", "c")
    settings = json.loads((adapter / "tokenizer_config.json").read_text())
    (adapter / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": "inline"}))
    ran = cli("fold", adapter, "--base", base, "-o", tmp_path / "out")
    assert ran.status == 0, ran.err
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == "inline"
    assert not list((tmp_path / "out").glob("chat_template.*"))


def test_a_tokenizer_without_chat_template_keeps_the_bases(plain: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = plain
    tokenizer(adapter, "a", "c")
    ran = cli("fold", adapter, "--base", base, "-o", tmp_path / "out")
    assert ran.status == 0, ran.err
    out = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (out.chat_template, out.convert_tokens_to_ids("c")) == ("the base's", 2)


def test_whose_chat_template_a_merge_has(plain: tuple[Path, Path], tmp_path: Path) -> None:
    """That of a model with its adapter may be in either folder, or be lost with the base's tokenizer."""
    base, adapter = plain
    copytree(base, tmp_path / "other")
    (base / "chat_template.jinja").rename(adapter / "chat_template.jinja")
    joined, other = f"{base}+{adapter}", str(tmp_path / "other")

    def planned(*models: str) -> tuple[str | None, list[str]]:
        plan = make_plan({"merge_method": "linear", "models": list(models), "parameters": {"weight": 0.5}})
        assert isinstance(plan, Plan)
        return plan.beside["chat_template"], [one for one in plan.warnings if "no chat template" in one]

    assert planned(joined, other) == ("adapter", [])
    (silent,) = planned(str(base), joined)[1]
    assert f"the output will have none; there is one in 'adapter'. Say `template: {joined}`" in silent
    tokenizer(adapter, "a", "b")
    (adapter / "chat_template.jinja").unlink()
    settings = json.loads((base / "tokenizer_config.json").read_text())
    (base / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": "inline"}))
    lost, (silent,) = planned(joined, other)
    assert lost is None
    assert "there is one in 'other'" in silent
    made = merged(adapters_made.recipe("linear", [joined, other], 0.5), tmp_path / "out")
    assert AutoTokenizer.from_pretrained(made).chat_template is None
    (adapter / "processor_config.json").write_text('{"chat_template": "of a processor"}')
    assert planned(joined, other) == ("adapter", [])


def test_a_processor_of_the_adapter(case: Trained, tmp_path: Path) -> None:
    copytree(case.base, tmp_path / "base")
    copytree(case.adapter, tmp_path / "adapter")
    for name in ("preprocessor_config.json", "video_preprocessor_config.json"):
        (tmp_path / "base" / name).write_text('{"of": "base"}')
    (tmp_path / "adapter" / "preprocessor_config.json").write_text('{"of": "adapter"}')
    made = cli("fold", tmp_path / "adapter", "--base", tmp_path / "base", "-o", tmp_path / "out", "--no-verify")
    assert made.status == 0, made.err

    def of(name: str) -> Any:
        return json.loads((tmp_path / "out" / name).read_text())["of"]

    assert (of("preprocessor_config.json"), of("video_preprocessor_config.json")) == ("adapter", "base")
    nested = json.dumps({"of": "adapter", "image_processor": {"of": "adapter"}})
    (tmp_path / "adapter" / "preprocessor_config.json").unlink()
    (tmp_path / "adapter" / "processor_config.json").write_text(nested)
    out = tmp_path / "nested"
    made = cli("fold", tmp_path / "adapter", "--base", tmp_path / "base", "-o", out, "--no-verify")
    assert made.status == 0, made.err
    assert not (out / "preprocessor_config.json").exists()
    assert json.loads((out / "processor_config.json").read_text())["of"] == "adapter"


def test_a_template_with_its_adapter_in_a_merge(plain: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = plain
    tokenizer(adapter, "a", "<img>")
    adapters_made.llama(5).save_pretrained(tmp_path / "other")
    recipe = {"merge_method": "linear", "models": [f"{base}+{adapter}", str(tmp_path / "other")]}
    out = merged(recipe | {"parameters": {"weight": 0.5}}, tmp_path / "out")
    assert AutoTokenizer.from_pretrained(out).convert_tokens_to_ids("<img>") == 2
    name = "model.layers.0.self_attn.q_proj.weight"
    one = PeftModel.from_pretrained(adapters_made.llama(), adapter).merge_and_unload().state_dict()[name]
    mean = (one + adapters_made.llama(5).state_dict()[name]) / 2
    torch.testing.assert_close(load_file(out / "model.safetensors")[name], mean, **SAME_WEIGHTS)


def test_a_live_model_has_the_adapters_tokenizer(plain: tuple[Path, Path]) -> None:
    base, adapter = plain
    tokenizer(adapter, "a", "<img>")
    (adapter / "generation_config.json").write_text('{"eos_token_id": 7}')
    live = LiveModel(make_plan({"merge_method": "copy", "models": [f"{base}+{adapter}"]}))
    assert AutoTokenizer.from_pretrained(live.processor_folder).convert_tokens_to_ids("<img>") == 2
    assert live.model.generation_config.eos_token_id == 7


def test_a_template_adapter_without_tokenizer_is_said(tmp_path: Path) -> None:
    for seed in (1, 2):
        adapters_made.adapter(tmp_path / str(seed), seed)
    tokenizer(tmp_path / "2", "a")
    said = make_plan(adapters_made.recipe("linear", [tmp_path / "1", tmp_path / "2"], 0.5)).warnings
    assert any("the output has no tokenizer because the template '1' has none; '2' has one" in one for one in said)


def test_became_is_of_every_weight_file(case: Trained) -> None:
    adapter = open_adapter("it", case.adapter)
    counted = len([entry for entry in adapter.entries if ".lora_" in entry.name])
    assert adapter.became == {MODEL: f"{counted} factors, 4 full weights"}
