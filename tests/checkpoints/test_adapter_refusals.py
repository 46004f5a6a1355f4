"""Adapters that cannot be read as they are: each is refused by name, with both values and the next step."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.utils.peft_types import PeftType
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from polymerge.checkpoints.adapter import open_adapter
from polymerge.errors import CheckpointError, PolymergeError, RecipeError, Refused

PREFIX = "base_model.model."
MODULE = "model.layers.0.self_attn.q_proj"
STEM = PREFIX + MODULE
FACTORS = {f"{STEM}.lora_A.weight": torch.zeros(2, 8), f"{STEM}.lora_B.weight": torch.zeros(6, 2)}
EMBEDDING = {
    f"{PREFIX}model.embed_tokens.lora_embedding_A": torch.zeros(2, 11),
    f"{PREFIX}model.embed_tokens.lora_embedding_B": torch.zeros(8, 2),
}
CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}


def saved(folder: Path, tensors: Mapping[str, Tensor] = FACTORS, **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(dict(tensors), folder / "adapter_model.safetensors")
    kept = {key: value for key, value in (CONFIG | config).items() if value != "left out"}
    (folder / "adapter_config.json").write_text(json.dumps(kept))
    return folder


def refusal(path: Path) -> list[PolymergeError]:
    with pytest.raises(PolymergeError) as caught:
        open_adapter("it", path)
    problems = caught.value.problems if isinstance(caught.value, Refused) else (caught.value,)
    assert all(str(problem).endswith((".", "?")) for problem in problems)
    assert all(str(path) in str(problem) for problem in problems)
    return list(problems)


def only(path: Path) -> str:
    problems = refusal(path)
    assert len(problems) == 1, [str(problem) for problem in problems]
    assert isinstance(problems[0], CheckpointError)
    return str(problems[0])


def test_what_these_tests_start_from_is_read(tmp_path: Path) -> None:
    adapter = open_adapter("it", saved(tmp_path, FACTORS | EMBEDDING))
    assert [pair.scaling for pair in adapter.pairs.values()] == [2.0, 2.0]


# --- the folder


def test_a_path_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    with pytest.raises(RecipeError, match=r"adapter 'it': .* has no 'adaptor'\. Did you mean 'adapter'\?"):
        open_adapter("it", tmp_path / "adaptor")


def test_a_folder_that_is_no_adapter(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    (problem,) = refusal(tmp_path)
    assert isinstance(problem, RecipeError)
    assert "has no adapter_config.json" in str(problem)
    assert "It holds 'model.safetensors'" in str(problem)


def test_a_file_in_place_of_a_folder(tmp_path: Path) -> None:
    (problem,) = refusal(saved(tmp_path) / "adapter_model.safetensors")
    assert isinstance(problem, RecipeError)


def test_no_weights(tmp_path: Path) -> None:
    (saved(tmp_path) / "adapter_model.safetensors").unlink()
    assert "has neither adapter_model.safetensors nor adapter_model.bin" in only(tmp_path)


def test_no_weights_but_those_of_llava(tmp_path: Path) -> None:
    (saved(tmp_path) / "adapter_model.safetensors").unlink()
    torch.save({PREFIX + "model.mm_projector.0.weight": torch.zeros(2)}, tmp_path / "non_lora_trainables.bin")
    assert "has neither" in only(tmp_path)


@pytest.mark.parametrize("name", ["adapter_config.json", "config.json", "adapter_model.safetensors"])
def test_a_git_lfs_pointer(tmp_path: Path, name: str) -> None:
    (saved(tmp_path) / name).write_text("version https://git-lfs.github.com/spec/v1\n")
    message = only(tmp_path)
    assert name in message
    assert "git lfs pull" in message


@pytest.mark.parametrize("name", ["adapter_config.json", "config.json", "adapter_model.safetensors"])
def test_a_link_to_nothing(tmp_path: Path, name: str) -> None:
    (saved(tmp_path) / name).unlink(missing_ok=True)
    (tmp_path / name).symlink_to(tmp_path / "gone")
    assert f"{name}: is a link to" in only(tmp_path)


@pytest.mark.parametrize("name", ["adapter_config.json", "config.json"])
@pytest.mark.parametrize(("text", "wrong"), [("{", "is not JSON"), ("[]", "expected object, got array")])
def test_a_broken_config(tmp_path: Path, name: str, text: str, wrong: str) -> None:
    (saved(tmp_path) / name).write_text(text)
    assert f"{name}: {wrong}" in only(tmp_path)


def test_a_truncated_file(tmp_path: Path) -> None:
    file = saved(tmp_path) / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    assert "is truncated" in only(tmp_path)


def test_code_in_a_pickle_is_not_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Callable[[str], Any], tuple[str]]:
            return (Path.touch, (tmp_path / "ran",))  # type: ignore[return-value]

    (saved(tmp_path) / "adapter_model.safetensors").unlink()
    torch.save({f"{STEM}.lora_A.weight": Evil()}, tmp_path / "adapter_model.bin")
    assert "adapter_model.bin" in only(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_an_empty_adapter(tmp_path: Path) -> None:
    assert "holds no tensors in 'adapter_model.safetensors'" in only(saved(tmp_path, {}))


def test_everything_at_once(tmp_path: Path) -> None:
    tensors = {f"{STEM}.lora_A.weight": torch.zeros(2, 8), f"{PREFIX}x.lora_B.weight": torch.zeros(6, 2)}
    folder = saved(tmp_path, tensors | {"y": torch.zeros(2)}, r=-1, use_rslora="yes", use_dora=True)
    (folder / "config.json").write_text("nonsense")
    torch.save([1], folder / "non_lora_trainables.bin")
    text = "\n".join(map(str, refusal(folder)))
    for part in (
        "r: expected int >= 1, got -1",
        'use_rslora: expected bool | null, got "yes"',
        "DoRA",
        "config.json: is not JSON",
        "trainables.bin: holds",
    ):
        assert part in text
    for part in (f"'{MODULE}': has lora_A and no lora_B", "'x': has lora_B and no lora_A", "'y' have names of no form"):
        assert part in text


# --- what the config says


@pytest.mark.parametrize("kind", [kind.value for kind in PeftType if kind.value != "LORA"])
def test_every_other_kind_of_peft(tmp_path: Path, kind: str) -> None:
    message = only(saved(tmp_path, peft_type=kind))
    assert f"peft_type is '{kind}', only 'LORA' can be read" in message
    assert "does not know" not in message
    assert "merge_and_unload" in message or "leave it out" in message


@pytest.mark.parametrize(
    ("kind", "wrong"),
    [
        ("QUUX", "'QUUX' is a kind that this version does not know"),
        ("left out", "peft_type is missing, 'LORA' expected"),
        (3, "peft_type is 3, 'LORA' expected"),
    ],
)
def test_kinds_that_nobody_knows(tmp_path: Path, kind: object, wrong: str) -> None:
    assert wrong in only(saved(tmp_path, peft_type=kind))


@pytest.mark.parametrize(
    ("key", "value", "why"),
    [
        ("use_dora", True, "DoRA"),
        ("kasa_config", {"beta": 0.1}, "KaSA"),
        ("use_bdlora", {"nblocks": 2}, "BD-LoRA"),
        ("monteclora_config", {"num_samples": 2}, "MonteCLoRA"),
        ("layer_replication", [[0, 2], [1, 3]], "repeats layers"),
        ("megatron_config", {"hidden_size": 8}, "Megatron"),
        ("enable_lora", [True, False, True], "fused layers"),
        ("use_qalora", True, "QA-LoRA"),
        ("alora_invocation_tokens", [1, 2], "after certain tokens"),
        ("arrow_config", {"top_k": 3}, "for each token"),
    ],
)
def test_variants_that_are_not_a_plain_product(tmp_path: Path, key: str, value: object, why: str) -> None:
    message = only(saved(tmp_path, **{key: value}))
    assert f"{key} is set to" in message
    assert why in message


@pytest.mark.parametrize("off", [None, False, [], {}])
def test_variants_that_are_off(tmp_path: Path, off: object) -> None:
    settings = dict.fromkeys(["use_dora", "kasa_config", "arrow_config", "target_parameters", "something_new"], off)
    assert open_adapter("it", saved(tmp_path, **settings)).pairs


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_16", "PiSSA", "olora", "corda", "lora_ga", "loftq"])
def test_starts_that_change_the_base(tmp_path: Path, start: str) -> None:
    message = only(saved(tmp_path, init_lora_weights=start))
    assert f"init_lora_weights is '{start}'" in message
    assert "changed base" in message
    assert ("path_initial_model_for_weight_conversion" in message) == (start != "loftq")


@pytest.mark.parametrize("start", [True, False, None, "gaussian", "eva", "orthogonal", "mica"])
def test_starts_that_leave_the_base(tmp_path: Path, start: object) -> None:
    assert open_adapter("it", saved(tmp_path, init_lora_weights=start)).pairs


def test_a_start_that_nobody_knows(tmp_path: Path) -> None:
    assert "init_lora_weights is 'svd2', not true, false or one of" in only(saved(tmp_path, init_lora_weights="svd2"))


def test_a_key_that_nobody_knows(tmp_path: Path) -> None:
    assert "sets 'use_more', which this version does not know" in only(saved(tmp_path, use_more=2))


@pytest.mark.parametrize(
    ("key", "value", "wrong"),
    [
        ("r", 0, "r: expected int >= 1, got 0"),
        ("r", 2.0, "r: expected int, got 2.0"),
        ("r", True, "r: expected int, got true"),
        ("r", "2", 'r: expected int, got "2"'),
        ("r", "left out", "r is missing"),
        ("lora_alpha", "4", 'lora_alpha: expected float, got "4"'),
        ("lora_alpha", float("nan"), "lora_alpha: expected float > -1e+30, got NaN"),
        ("lora_alpha", float("inf"), "lora_alpha: expected float < 1e+30, got Infinity"),
        ("lora_alpha", 10**400, "the number 10000000000000000000... has more than 300 digits"),
        ("lora_alpha", True, "lora_alpha: expected float, got true"),
        ("lora_alpha", None, "lora_alpha: expected float, got null"),
        ("use_rslora", 1, "use_rslora: expected bool | null, got 1"),
        ("fan_in_fan_out", "no", 'fan_in_fan_out: expected bool | null, got "no"'),
        ("modules_to_save", 3, "modules_to_save: expected str | array | null, got 3"),
        ("modules_to_save", ["lm_head", 3], "modules_to_save[1]: expected str, got 3"),
        ("rank_pattern", ["x"], "rank_pattern: expected object | null, got array"),
        ("rank_pattern", {"x": 0}, "rank_pattern['x']: expected int >= 1, got 0"),
        ("rank_pattern", {"(": 2}, "rank_pattern['(']: expected a regular expression ("),
        ("alpha_pattern", {"x": "y"}, "alpha_pattern['x']: expected float, got "),
    ],
)
def test_values_that_cannot_be_used(tmp_path: Path, key: str, value: object, wrong: str) -> None:
    assert wrong in only(saved(tmp_path, **{key: value}))


# --- what the factors are


@pytest.mark.parametrize("tensors", [FACTORS, EMBEDDING], ids=["linear", "embedding"])
@pytest.mark.parametrize("left", [0, 1])
def test_one_factor_of_two(tmp_path: Path, tensors: dict[str, Tensor], left: int) -> None:
    name = list(tensors)[left]
    prefix = "lora_embedding_" if "embedding" in name else "lora_"
    message = only(saved(tmp_path, {name: tensors[name]}))
    assert f"has {prefix}{'AB'[left]} and no {prefix}{'BA'[left]}" in message


def test_a_bias_without_factors(tmp_path: Path) -> None:
    assert "'x': has lora_B.bias and no lora_A" in only(
        saved(tmp_path, FACTORS | {f"{PREFIX}x.lora_B.bias": torch.zeros(6)})
    )


def test_a_bias_that_does_not_fit(tmp_path: Path) -> None:
    message = only(saved(tmp_path, FACTORS | {f"{STEM}.lora_B.bias": torch.zeros(7)}, lora_bias=True))
    assert "lora_B.bias [7], lora_B [6, 2]" in message


def test_ranks_that_differ(tmp_path: Path) -> None:
    message = only(saved(tmp_path, FACTORS | {f"{STEM}.lora_B.weight": torch.zeros(6, 3)}))
    assert f"'{MODULE}': lora_A [2, 8], lora_B [6, 3]: ranks 2 and 3" in message


@pytest.mark.parametrize("settings", [{"r": 4}, {"rank_pattern": {"q_proj": 4}}])
def test_a_rank_that_is_not_the_configs(tmp_path: Path, settings: dict[str, Any]) -> None:
    assert f"'{MODULE}': of rank 2, adapter_config.json says 4" in only(saved(tmp_path, **settings))


def test_many_modules_with_one_fault_are_one_message(tmp_path: Path) -> None:
    tensors = {
        f"{PREFIX}layers.{layer}.q.lora_{kind}.weight": torch.zeros(2, 2) for layer in range(30) for kind in "AB"
    }
    assert "and 27 more: of rank 2, adapter_config.json says 16" in only(saved(tmp_path, tensors, r=16))


@pytest.mark.parametrize(
    ("a", "b", "words"),
    [
        ((2, 8, 3), (8, 2), "not the factors of a linear layer or of a convolution"),
        ((2, 8), (8, 2, 1), "not the factors of a linear layer or of a convolution"),
        ((2, 8, 3), (8, 2, 3), "not the factors of a linear layer or of a convolution"),
        ((2, 8, 3), (8, 1, 1), "factors of a convolution in groups, which PEFT cannot merge either. Train it without"),
        ((2, 8, 3, 3), (8, 3, 1, 1), "ranks 2 and 3"),
        ((4, 8, 3), (8, 4, 1), "of rank 4, adapter_config.json says 2"),
    ],
)
def test_convolutions(a: tuple[int, ...], b: tuple[int, ...], words: str, tmp_path: Path) -> None:
    tensors = {f"{STEM}.lora_A.weight": torch.zeros(a), f"{STEM}.lora_B.weight": torch.zeros(b)}
    assert words in only(saved(tmp_path, tensors))


@pytest.mark.parametrize("shape", [(16,), (0,), (0, 8), ()])
def test_factors_that_were_not_gathered(tmp_path: Path, shape: tuple[int, ...]) -> None:
    assert "Gather it" in only(saved(tmp_path, FACTORS | {f"{STEM}.lora_A.weight": torch.zeros(shape)}))


def test_both_kinds_of_factors_in_one_module(tmp_path: Path) -> None:
    both = {name.replace("model.embed_tokens", MODULE): tensor for name, tensor in EMBEDDING.items()}
    assert "factors of an embedding and of a linear layer" in only(saved(tmp_path, FACTORS | both))


@pytest.mark.parametrize(
    "name", [f"{STEM}.lora_A.weight", PREFIX + "lm_head.weight", PREFIX + "lm_head.base_layer.weight"]
)
def test_types_that_cannot_be_merged(tmp_path: Path, name: str) -> None:
    message = only(saved(tmp_path, FACTORS | {name: torch.zeros(2, 8, dtype=torch.uint8)}))
    assert f"'{name}' of dtype U8, which cannot be merged" in message


# --- what the names are


@pytest.mark.parametrize(
    "name",
    [
        f"{MODULE}.lora_A.weight",  # no prefix
        "lora_unet_down_blocks_0.lora_down.weight",
        f"{STEM}.lora_A.bias",
        f"{STEM}.lora_E",
        f"{STEM}.lora_A.default.weight.absmax",
        f"{PREFIX}mlp.experts.base_layer.lora_A.weight",
        f"{PREFIX}lm_head.base_layer.weight.absmax",
        f"{PREFIX}lora_A.weight",
        f"{PREFIX}embed.token_adapter.something",
        PREFIX,
    ],
)
def test_names_of_no_known_form(tmp_path: Path, name: str) -> None:
    assert f"'{name}' have names of no form" in only(saved(tmp_path, FACTORS | {name: torch.zeros(2, 2)}))


@pytest.mark.parametrize("tail", ["", ".default", ".default.weight"])
def test_magnitudes_without_a_word_in_the_config(tmp_path: Path, tail: str) -> None:
    message = only(saved(tmp_path, FACTORS | {f"{STEM}.lora_magnitude_vector{tail}": torch.zeros(6)}))
    assert "belong to DoRA" in message


def test_two_adapters_in_one_file(tmp_path: Path) -> None:
    tensors = {
        f"{PREFIX}{module}.lora_{kind}.{adapter}.weight": torch.zeros(2, 2)
        for module, adapter in (("x", "vision"), ("y", "speech"))
        for kind in "AB"
    }
    assert "belong to 2 adapters, 'speech', 'vision'" in only(saved(tmp_path, tensors))


def test_one_factor_under_two_names(tmp_path: Path) -> None:
    message = only(saved(tmp_path, FACTORS | {f"{STEM}.lora_A.default.weight": torch.zeros(2, 8)}))
    assert "stand for one tensor" in message


def test_a_wrapped_copy_of_another_shape(tmp_path: Path) -> None:
    tensors = {PREFIX + "x.weight": torch.zeros(2), PREFIX + "x.modules_to_save.weight": torch.zeros(3)}
    assert "stand for one tensor" in only(saved(tmp_path, FACTORS | tensors))


def test_one_weight_in_both_files_of_llava(tmp_path: Path) -> None:
    saved(tmp_path, FACTORS | {PREFIX + "model.mm_projector.0.weight": torch.zeros(2)})
    torch.save({PREFIX + "model.mm_projector.0.weight": torch.ones(2)}, tmp_path / "non_lora_trainables.bin")
    message = only(tmp_path)
    assert "non_lora_trainables.bin" in message
    assert "adapter_model.safetensors stand for one tensor" in message


# --- trained tokens

ROWS = f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta"


@pytest.mark.parametrize(
    ("indices", "wrong"),
    [
        (None, f"does not say which rows '{ROWS}' holds"),
        ({"wte": [1, 2]}, "does not say which rows"),
        ([1], f"'{ROWS}' is [2, 8], adapter_config.json names 1 rows"),
        ({"embed_tokens": [1, 2, 3]}, "names 3 rows"),
        ([1, 1], "trainable_token_indices: expected different indices"),
        ([-1, 1], "trainable_token_indices[0]: expected int >= 0, got -1"),
        (["1", 2], 'trainable_token_indices[0]: expected int, got "1"'),
        ({"embed_tokens": 1}, "trainable_token_indices['embed_tokens']: expected array, got 1"),
        (7, "trainable_token_indices: expected object | array | null, got 7"),
    ],
)
def test_rows_that_the_config_does_not_fit(tmp_path: Path, indices: object, wrong: str) -> None:
    tensors = FACTORS | {ROWS: torch.zeros(2, 8)}
    assert wrong in only(saved(tmp_path, tensors, trainable_token_indices=indices))


def test_rows_that_are_not_there(tmp_path: Path) -> None:
    message = only(saved(tmp_path, trainable_token_indices=[1]))
    assert "trainable_token_indices is set, and no trainable_tokens_delta is there" in message


def test_one_list_is_of_an_embedding_and_of_the_head_that_is_tied_to_it(tmp_path: Path) -> None:
    """PEFT saves both where the vocabulary was resized."""
    tensors = FACTORS | {ROWS: torch.zeros(1, 8), ROWS.replace("model.embed_tokens", "lm_head"): torch.zeros(1, 8)}
    tokens = open_adapter("a", saved(tmp_path, tensors, trainable_token_indices=[1])).tokens
    assert [(name, rows) for name, (rows, _) in sorted(tokens.items())] == [
        ("lm_head.weight", (1,)), ("model.embed_tokens.weight", (1,))
    ]  # fmt: skip


EXPERTS = "model.layers.0.mlp.experts"


def wrapped(
    depth: int, a: tuple[int, ...] = (4, 8), b: tuple[int, ...] = (8, 4), bias: bool = False
) -> dict[str, Tensor]:
    """Factors of a parameter of experts, below as many wrappers of further parameters."""
    name = f"{PREFIX}{EXPERTS}{'.base_layer' * depth}"
    factors = {f"{name}.lora_A.weight": torch.zeros(a), f"{name}.lora_B.weight": torch.zeros(b)}
    return factors | ({f"{name}.lora_B.bias": torch.zeros(8)} if bias else {})


@pytest.mark.parametrize(
    ("tensors", "parameters", "words"),
    [
        (wrapped(1), ["mlp.experts.down_proj"], "has 1 pairs of factors, and target_parameters names 'down_proj'"),
        (wrapped(0) | wrapped(1), ["experts.down_proj"], "2 pairs of factors, and target_parameters names 'down_proj'"),
        (wrapped(0), ["down_proj", "experts.gate_up_proj"], "1 pairs of factors, and target_parameters names the 2"),
        (wrapped(0) | wrapped(1), ["attn.down_proj"], "2 pairs of factors, and target_parameters names no parameter"),
        (wrapped(0) | wrapped(1), ["experts.first", "experts.second"], "their names do not tell which are whose"),
        (wrapped(0, a=(5, 8), b=(8, 5)), ["down_proj"], "of 5 rows, adapter_config.json says rank 2"),
        (wrapped(0, bias=True), ["down_proj"], "has lora_bias or fan_in_fan_out"),
        (wrapped(0, a=(4, 8, 3)), ["down_proj"], "not the factors of a linear layer or of a convolution"),
        (wrapped(0, a=(4, 8, 3), b=(8, 4, 1)), ["down_proj"], "factors of a convolution, which is no parameter of"),
    ],
)
def test_factors_of_parameters_that_cannot_be_told_apart(
    tensors: dict[str, Tensor], parameters: list[str], words: str, tmp_path: Path
) -> None:
    message = only(saved(tmp_path, FACTORS | tensors, target_parameters=parameters))
    assert words in message
    assert f"'{EXPERTS}" in message


def test_without_target_parameters_their_names_are_of_no_form(tmp_path: Path) -> None:
    """PEFT wraps one module once for each of its parameters, so that names are of no form that modules have."""
    assert "have names of no form that is known" in only(saved(tmp_path, FACTORS | wrapped(1)))


# --- as PEFT itself writes them


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
@pytest.mark.parametrize(
    "settings", [{"use_dora": True}, {"init_lora_weights": "olora"}, {"init_lora_weights": "pissa"}]
)
def test_variants_that_peft_saves(tmp_path: Path, settings: dict[str, Any]) -> None:
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2}
    shape = {"vocab_size": 13, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1}
    config = LoraConfig(r=2, target_modules=["q_proj"], **settings)
    get_peft_model(LlamaForCausalLM(LlamaConfig(**shape, **heads)), config).save_pretrained(tmp_path)
    assert next(iter(settings)) in str(refusal(tmp_path)[0])
