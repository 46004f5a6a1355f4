"""Adapters as PEFT and LLaVA write them: what is read is what PEFT itself computes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from polymerge.checkpoints.adapter import Adapter, is_adapter, open_adapter
from polymerge.checkpoints.adapter_config import foreign_kind, read_lora_config
from polymerge.checkpoints.pairs import Pair
from polymerge.checkpoints.tensor_info import TensorInfo
from polymerge.errors import Refused

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{message}")
    for message in (
        "`is_gradient_checkpointing` is deprecated",
        "Setting `save_embedding_layers` to `True` as embedding layers",
        "Adapter 'default'. . LoRA tensor.s. have invalid shape",  # it takes lora_B.bias for a broken factor
        "fan_in_fan_out is set to False but the target module is `Conv1D`",
        "`loftq_config` specified but will be ignored",
    )
]

PREFIX = "base_model.model."
ATTENTION = "model.layers.0.self_attn"
PROJECTOR = "model.mm_projector.0.weight"


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"vocab_size": 13, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "attention_bias": True, "tie_word_embeddings": False}
    return LlamaForCausalLM(LlamaConfig(**shape, **heads, bos_token_id=1, eos_token_id=2))


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    shape = {"vocab_size": 13, "n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 8}
    return GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=1, eos_token_id=2))


def trained(model: nn.Module, **settings: Any) -> PeftModel:
    """A PEFT model whose every trainable parameter was changed, as training would."""
    peft = get_peft_model(model, LoraConfig(**{"r": 2, "lora_alpha": 3, "target_modules": ["q_proj"]} | settings))
    with torch.no_grad():
        for parameter in peft.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    return peft


def values(entry: TensorInfo) -> Tensor:
    """The tensor that lies where the entry says."""
    assert entry.dtype == "F32"
    data = bytearray(entry.file.read_bytes()[entry.start : entry.start + entry.nbytes])
    return torch.frombuffer(data, dtype=torch.float32).reshape(entry.shape)


def update(pair: Pair) -> Tensor:
    product = values(pair.b) @ values(pair.a) * pair.scaling
    assert product.shape == pair.shape
    return product.T if pair.transposed else product


def folded(base: dict[str, Tensor], adapter: Adapter) -> dict[str, Tensor]:
    """The base with everything that the adapter holds."""
    weights = {name: tensor.clone() for name, tensor in base.items()}
    for name, entry in adapter.non_lora.items():
        assert weights[name].shape == entry.shape
        weights[name] = values(entry)
    for name, (indices, rows) in adapter.tokens.items():
        weights[name][list(indices)] = values(rows)
    for module, pair in adapter.pairs.items():
        weights[f"{module}.weight"] = weights[f"{module}.weight"] + update(pair)
        if pair.bias:
            weights[f"{module}.bias"] = weights[f"{module}.bias"] + values(pair.bias) * pair.scaling
    return weights


CASES: dict[str, dict[str, Any]] = {
    "a list of targets": {"target_modules": ["q_proj", "v_proj"]},
    "all linear": {"target_modules": "all-linear"},
    "a pattern as target": {"target_modules": r".*layers\.1\..*\.(k|down)_proj"},
    "embeddings": {"target_modules": ["embed_tokens", "lm_head", "v_proj"]},
    "rank stabilized": {"target_modules": ["q_proj", "embed_tokens"], "use_rslora": True, "r": 4, "lora_alpha": 5},
    "patterns": {
        "target_modules": "all-linear",
        "rank_pattern": {f"^{ATTENTION}.q_proj": 4, "down_proj": 1, r"layers\.1\.mlp\..*": 3},
        "alpha_pattern": {"down_proj": 0.5, r"layers.\d+.mlp..*": 9, "q_proj": 7},
    },
    "patterns, rank stabilized": {
        "target_modules": ["q_proj", "embed_tokens"],
        "rank_pattern": {"embed_tokens": 5},
        "alpha_pattern": {"embed_tokens": 11},
        "use_rslora": True,
    },
    "modules to save": {"modules_to_save": ["lm_head", "norm"]},
    "a whole block to save": {"modules_to_save": ["mlp"]},
    "bias of the factors": {"lora_bias": True},
    "all biases": {"bias": "all", "modules_to_save": ["k_proj"], "lora_bias": True},
    "biases of the adapted": {"bias": "lora_only"},
    "tokens": {"trainable_token_indices": [5, 0, 3]},
    "tokens by name": {"trainable_token_indices": {"embed_tokens": [5, 0], "lm_head": [12]}},
    "orthogonal": {"init_lora_weights": "orthogonal", "target_modules": ["q_proj", "down_proj"]},
    "mica": {"init_lora_weights": "mica", "target_modules": ["q_proj", "down_proj"]},
}
CONTAINERS = pytest.mark.parametrize("suffix", [".safetensors", ".bin"])


def compare(peft: PeftModel, base: dict[str, Tensor], folder: Path) -> Adapter:
    """Read the adapter and hold it against PEFT, module by module and as a whole."""
    adapter = open_adapter("it", folder)
    layers = {name.removeprefix(PREFIX): one for name, one in peft.named_modules() if isinstance(one, LoraLayer)}
    assert set(adapter.pairs) == set(layers)
    for module, layer in layers.items():
        pair = adapter.pairs[module]
        assert pair.module == module
        assert (pair.rank, pair.scaling) == (layer.r["default"], layer.scaling["default"])
        assert pair.embedding == bool(layer.lora_embedding_A)
        torch.testing.assert_close(update(pair), layer.get_delta_weight("default").detach())
    merged = peft.merge_and_unload().state_dict()
    expected = folded(base, adapter)
    assert set(merged) == set(expected)
    for name, tensor in merged.items():
        torch.testing.assert_close(expected[name], tensor, msg=name)
    return adapter


@pytest.mark.parametrize("settings", CASES.values(), ids=CASES)
def test_what_peft_saves(tmp_path: Path, settings: dict[str, Any]) -> None:
    model = llama()
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    peft = trained(model, **settings)
    peft.save_pretrained(tmp_path)
    adapter = compare(peft, base, tmp_path)
    assert is_adapter(tmp_path)
    assert adapter.layout == "peft"
    assert adapter.model_config == {}
    assert adapter.config["peft_type"] == "LORA"
    assert [file.name for file in adapter.files] == ["adapter_model.safetensors"]
    held = set(load_file(adapter.files[0]))
    assert {entry.name for entry in adapter.entries} | set(adapter.skipped) == held


@CONTAINERS
def test_both_kinds_of_file(tmp_path: Path, suffix: str) -> None:
    model = llama()
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    peft = trained(model, target_modules=["q_proj", "embed_tokens"], modules_to_save=["lm_head"])
    peft.save_pretrained(tmp_path, safe_serialization=suffix == ".safetensors")
    adapter = compare(peft, base, tmp_path)
    assert [file.name for file in adapter.files] == [f"adapter_model{suffix}"]


def test_safetensors_come_first(tmp_path: Path) -> None:
    peft = trained(llama())
    peft.save_pretrained(tmp_path)
    (tmp_path / "adapter_model.bin").write_bytes(b"not looked at")
    assert [file.suffix for file in open_adapter("it", tmp_path).files] == [".safetensors"]


def test_weights_that_are_stored_transposed(tmp_path: Path) -> None:
    model = gpt2()
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    peft = trained(model, target_modules=["c_attn"])
    peft.save_pretrained(tmp_path)
    pair = open_adapter("it", tmp_path).pairs["transformer.h.0.attn.c_attn"]
    assert pair.transposed
    assert not pair.embedding
    assert pair.shape == (24, 8)
    assert update(pair).shape == base["transformer.h.0.attn.c_attn.weight"].shape == (8, 24)
    compare(peft, base, tmp_path)


def test_an_embedding_that_was_saved_whole(tmp_path: Path) -> None:
    """PEFT saves the base's embedding beside its factors, and one that was resized without any."""
    peft = trained(llama(), target_modules=["embed_tokens", "q_proj"])
    peft.save_pretrained(tmp_path / "adapted")
    adapter = open_adapter("it", tmp_path / "adapted")
    assert list(adapter.non_lora) == ["model.embed_tokens.weight"]
    assert adapter.non_lora["model.embed_tokens.weight"].name == PREFIX + "model.embed_tokens.base_layer.weight"
    assert adapter.pairs["model.embed_tokens"].transposed

    trained(llama(), trainable_token_indices=[1]).save_pretrained(tmp_path / "resized", save_embedding_layers=True)
    adapter = open_adapter("it", tmp_path / "resized")
    assert sorted(adapter.non_lora) == ["lm_head.weight", "model.embed_tokens.weight"]
    assert adapter.tokens["model.embed_tokens.weight"][0] == (1,)


def test_patterns_that_overlap_count_as_peft_loads_them(tmp_path: Path) -> None:
    """It sorts them when it saves, so that another one may come first than in training."""
    peft = trained(llama(), alpha_pattern={"q_proj": 7, r"layers\.1\..*": 9})
    peft.save_pretrained(tmp_path)
    adapter = open_adapter("it", tmp_path)
    loaded = PeftModel.from_pretrained(llama(), tmp_path)
    module = "model.layers.1.self_attn.q_proj"
    assert peft.get_submodule(PREFIX + module).scaling["default"] == 7 / 2
    assert loaded.get_submodule(PREFIX + module).scaling["default"] == adapter.pairs[module].scaling == 9 / 2


def renamed(folder: Path, rename: Callable[[str], str]) -> None:
    file = folder / "adapter_model.safetensors"
    save_file({rename(name): tensor for name, tensor in load_file(file).items()}, file)


@pytest.mark.parametrize("adapter_name", ["default", "vision"])
def test_names_of_older_versions(tmp_path: Path, adapter_name: str) -> None:
    """They put the adapter's name after the factor's, and kept the wrapper of modules to save."""
    settings = {"target_modules": ["q_proj", "embed_tokens"], "modules_to_save": ["mlp"], "lora_bias": False}
    trained(llama(), **settings).save_pretrained(tmp_path)
    new = open_adapter("it", tmp_path)
    updates = {module: update(pair) for module, pair in new.pairs.items()}

    def older(name: str) -> str:
        for kind in "AB":
            name = name.replace(f".lora_{kind}.", f".lora_{kind}.{adapter_name}.")
            name = name.replace(f".lora_embedding_{kind}", f".lora_embedding_{kind}.{adapter_name}")
        return name.replace(".mlp.", f".mlp.modules_to_save.{adapter_name}.")

    renamed(tmp_path, older)
    old = open_adapter("it", tmp_path)
    assert set(old.pairs) == set(new.pairs)
    assert set(old.non_lora) == set(new.non_lora)
    for module, expected in updates.items():
        assert torch.equal(update(old.pairs[module]), expected)

    renamed(tmp_path, lambda name: name.replace(f".modules_to_save.{adapter_name}.", ".modules_to_save."))
    assert set(open_adapter("it", tmp_path).non_lora) == set(new.non_lora)


def test_a_module_that_bears_a_number_is_no_adapter_name(tmp_path: Path) -> None:
    trained(llama()).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file(load_file(file) | {PREFIX + "model.mm_projector.modules_to_save.0.weight": torch.zeros(2)}, file)
    assert list(open_adapter("it", tmp_path).non_lora) == [PROJECTOR]


def llava(folder: Path, beside: dict[str, Tensor]) -> Adapter:
    """A folder as LLaVA's training leaves it."""
    peft = trained(llama(), target_modules=["q_proj", "v_proj"], r=4, lora_alpha=8)
    peft.save_pretrained(folder, safe_serialization=False)
    torch.save(beside, folder / "non_lora_trainables.bin")
    (folder / "config.json").write_text(json.dumps({"model_type": "llava", "mm_hidden_size": 4}))
    return open_adapter("it", folder)


def test_what_llava_saves(tmp_path: Path) -> None:
    weight, bias = torch.randn(8, 4), torch.randn(8)
    stem = PREFIX + "model.mm_projector"
    adapter = llava(tmp_path, {f"{stem}.0.weight": weight, f"{stem}.0.bias": bias, PREFIX + "lm_head.weight": weight})
    assert adapter.layout == "llava"
    assert adapter.model_config["model_type"] == "llava"
    assert [file.name for file in adapter.files] == ["adapter_model.bin", "non_lora_trainables.bin"]
    assert list(adapter.pairs)[:2] == [f"{ATTENTION}.q_proj", f"{ATTENTION}.v_proj"]
    assert {pair.scaling for pair in adapter.pairs.values()} == {2.0}
    assert sorted(adapter.non_lora) == ["lm_head.weight", "model.mm_projector.0.bias", PROJECTOR]
    assert torch.equal(values(adapter.non_lora[PROJECTOR]), weight)
    assert torch.equal(values(adapter.non_lora["lm_head.weight"]), weight)
    assert is_adapter(tmp_path)


@pytest.mark.parametrize(
    ("key", "name"),
    [
        (PREFIX + "model.mm_projector.0.weight", PROJECTOR),
        ("model.model.mm_projector.0.weight", PROJECTOR),
        ("model.mm_projector.0.weight", PROJECTOR),
        ("base_model.model.mm_projector.0.weight", "mm_projector.0.weight"),
        (PREFIX + "lm_head.weight", "lm_head.weight"),
        (PREFIX + "model.mm_projector.modules_to_save.default.0.weight", PROJECTOR),
        (PREFIX + "model.vision_tower.vision_tower.x.weight", "model.vision_tower.vision_tower.x.weight"),
    ],
)
def test_prefixes_that_llava_takes_off(tmp_path: Path, key: str, name: str) -> None:
    assert list(llava(tmp_path, {key: torch.zeros(3)}).non_lora) == [name]


def test_a_copy_under_its_wrapper_is_left_out(tmp_path: Path) -> None:
    """Training with modules_to_save in LLaVA saves them twice: by PEFT, and with the rest of the parameters."""
    trained(llama(), modules_to_save=["lm_head"]).save_pretrained(tmp_path, safe_serialization=False)
    copy = PREFIX + "lm_head.modules_to_save.default.weight"
    trained_head = torch.load(tmp_path / "adapter_model.bin", weights_only=True)[PREFIX + "lm_head.weight"]
    torch.save({copy: trained_head}, tmp_path / "non_lora_trainables.bin")
    adapter = open_adapter("it", tmp_path)
    assert adapter.non_lora["lm_head.weight"].file.name == "adapter_model.bin"
    assert torch.equal(values(adapter.non_lora["lm_head.weight"]), trained_head)
    assert adapter.became["non_lora_trainables.bin"].startswith("1 that adapter_model.bin holds byte for byte")


def test_a_copy_that_is_not_equal_is_refused(tmp_path: Path) -> None:
    trained(llama(), modules_to_save=["lm_head"]).save_pretrained(tmp_path, safe_serialization=False)
    copy = PREFIX + "lm_head.modules_to_save.default.weight"
    torch.save({copy: torch.zeros(13, 8)}, tmp_path / "non_lora_trainables.bin")
    with pytest.raises(Refused, match=r"stand for one tensor\. They are not equal: move the file"):
        open_adapter("it", tmp_path)


def test_only_full_weights(tmp_path: Path) -> None:
    """LLaVA's pretraining of the projector saves no factors; here PEFT's file is there and has none."""
    trained(llama()).save_pretrained(tmp_path)
    save_file({PREFIX + "lm_head.weight": torch.zeros(13, 8)}, tmp_path / "adapter_model.safetensors")
    adapter = open_adapter("it", tmp_path)
    assert not adapter.pairs
    assert list(adapter.non_lora) == ["lm_head.weight"]


def test_which_folders_are_adapters(tmp_path: Path) -> None:
    assert not is_adapter(tmp_path / "nowhere")
    assert not is_adapter(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    assert is_adapter(tmp_path)
    assert not is_adapter(tmp_path / "adapter_config.json")
    for name in ("training_args.bin", "non_lora_trainables.bin", "adapter_model.safetensors", "optimizer.pt"):
        (tmp_path / name).touch()
    assert is_adapter(tmp_path)
    for name in ("model.safetensors", "model-00001-of-00002.safetensors", "pytorch_model.bin.index.json"):
        (tmp_path / name).touch()
        assert not is_adapter(tmp_path)
        (tmp_path / name).unlink()


def test_every_key_that_peft_writes_is_known() -> None:
    plain = LoraConfig().to_dict() | {"peft_type": "LORA"}
    assert foreign_kind(plain, "here") is None
    read_lora_config(plain, "here")
    for key in plain:
        said = ""
        try:
            read_lora_config({"r": 1, "lora_alpha": 1, key: "a few words"}, "here")
        except Refused as refused:  # they are nonsense as a value of most keys
            said = str(refused)
        assert "does not know" not in said, key
    with pytest.raises(Refused, match="sets 'new_in_peft', which this version does not know"):
        read_lora_config(plain | {"new_in_peft": "a few words"}, "here")
