"""Tiny checkpoints of the families that transformers has no class of, with all the names of published ones.

    tree = TREES["minicpm_v"]["qwen2"]                            # MiniCPM-V 2.6
    settings = config_of(tree, decoder("qwen2", ...), "float32")  # its config.json
    blank(tree, settings)                                         # every tensor that it has
    plain_llm(folder)                                             # of the Qwen2 in such a folder, as a Qwen2 has them
    joined(folder, llm, average)                                  # all of it, the text tower averaged with a Qwen2's

Decoders are taken apart and put together by `layouts`, which knows nothing of polymerge's tables.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from layouts import BUFFER, TWICE, Sizes, load, stored, tower_of, tower_shapes
from tiny_trees import FAMILY_OF, LAYOUTS, TREES, Tree

CODE = """# Stands for the code that is published beside the weights: there is a config, and no model.
from transformers import PreTrainedConfig


class {}(PreTrainedConfig):
    model_type = "{}"
"""

CLASSES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "internlm2": "InternLM2ForCausalLM"}


def config_of(tree: Tree, text: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """Its config.json, of a decoder that has the config `text` as a plain language model."""
    text = dict(text)
    keys, tie = text.pop("num_key_value_heads"), text["tie_word_embeddings"]
    if tree.shared:
        text[tree.shared] = keys
    if tree.layout == "molmo":  # counts gate and up
        rows = text["vocab_size"]
        text |= {"intermediate_size": 2 * text["intermediate_size"], "embedding_size": rows, "weight_tying": tie}
    own = {**tree.config, "tie_word_embeddings": tie, "torch_dtype": dtype}
    if tree.nested:
        return {**own, tree.nested: {**text, "architectures": [CLASSES[tree.kind]], "torch_dtype": dtype}}
    del text["model_type"]
    return {**text, **own}


def write_config(folder: Path, settings: Mapping[str, Any]) -> None:
    """Write config.json and what stands for the code that it points to."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(settings, indent=1), encoding="utf-8")
    for kind, place in settings.get("auto_map", {}).items():
        module, _, name = place.partition(".")
        said = CODE.format(name, settings.get("model_type", "")) if kind == "AutoConfig" else CODE.partition("\n")[0]
        (folder / f"{module}.py").write_text(said, encoding="utf-8")


def sizes_of(tree: Tree, settings: Mapping[str, Any]) -> Sizes:
    """The sizes of its decoder."""
    text = settings.get(tree.nested, settings)
    heads, hidden, inner = (text[key] for key in ("num_attention_heads", "hidden_size", "intermediate_size"))
    inner = inner // 2 if tree.layout == "molmo" else inner
    keys = text[tree.shared] if tree.shared else heads
    return Sizes(heads, hidden // heads, keys, hidden, inner, text["vocab_size"], text["num_hidden_layers"])


def blank(tree: Tree, settings: Mapping[str, Any]) -> dict[str, Tensor]:
    """Every tensor of a checkpoint with this config, not filled yet."""
    sizes = sizes_of(tree, settings)
    shapes = tower_shapes(sizes, TWICE.get(tree.layout, ()), tree.more)
    if settings["tie_word_embeddings"]:
        del shapes["lm_head.weight"]
    text = stored(tree.layout, {name: torch.empty(shape) for name, shape in shapes.items()}, sizes)
    buffers = [BUFFER.format(layer) for layer in range(sizes.layers)] if tree.buffers else []
    return {
        **{tree.root + name: tensor for name, tensor in text.items()},
        **{name: torch.empty(sizes.width // 2) for name in buffers},
        **{name: torch.empty(shape) for name, shape in tree.eyes.items()},
    }


# --- what lies in folders


def tree_in(folder: Path) -> tuple[Tree, Sizes]:
    """What lies in a folder, and how large its decoder is."""
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (tree,) = (tree for tree in TREES[FAMILY_OF[settings["architectures"][0]]].values() if tree.is_of(settings))
    return tree, sizes_of(tree, settings)


def tower_in(folder: Path) -> dict[str, Tensor]:
    """The text tower of a checkpoint by plain names, its fused tensors cut apart."""
    tree, sizes = tree_in(folder)
    inside = {
        name.removeprefix(tree.root): tensor for name, tensor in load(folder).items() if name.startswith(tree.root)
    }
    return tower_of(tree.layout, inside, sizes)


def plain_llm(vlm: Path) -> dict[str, Tensor]:
    """The plain language model in a checkpoint, by the names that it has; of two branches that of text tokens."""
    tree, sizes = tree_in(vlm)
    tower = {name: tensor for name, tensor in tower_in(vlm).items() if "@" not in name}
    return stored(LAYOUTS.get(tree.kind, "llama"), tower, sizes)


def joined(vlm: Path, llm: Path, mix: Callable[[Tensor, Tensor], Tensor]) -> dict[str, Tensor]:
    """All tensors of a checkpoint, those of its text tower, in every branch, mixed with a plain language model's."""
    tree, sizes = tree_in(vlm)
    kind = json.loads((llm / "config.json").read_text(encoding="utf-8"))["model_type"]
    theirs = tower_of(LAYOUTS.get(kind, "llama"), load(llm), sizes)
    tower = tower_in(vlm)
    for name, tensor in tower.items():
        if (plain := name.partition("@")[0]) in theirs:
            tower[name] = mix(tensor, theirs[plain])
    mixed = {tree.root + name: tensor for name, tensor in stored(tree.layout, tower, sizes).items()}
    return load(vlm) | mixed
