"""Inputs whose bytes are read without trouble and mean nothing good: configs, adapters, recipes, plans."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import safetensors.torch
import torch
import yaml

from fuzz_judge import CANARY, Files, Kind
from fuzz_mutations import ODD_TEXTS, changed, odd, odd_bytes, to_json
from fuzz_seeds import ADAPTER, FAMILIES, PLACE, lora_tensors, seeds, with_place
from polymerge.checkpoints import open_checkpoint
from polymerge.checkpoints.adapter import open_adapter
from polymerge.checkpoints.files import read_config
from polymerge.checkpoints.tokenizer import read_tokens
from polymerge.dtypes import NAMES
from polymerge.engine.merge import merge
from polymerge.families import (
    FAMILIES as TABLES,
)
from polymerge.families import (
    family_of,
    quantization_method,
    read_names,
    splits,
    text_tower,
    untied,
    with_rows,
)
from polymerge.families.config import config_dtype
from polymerge.families.quantization import why_quantized, without_quantization
from polymerge.families.rules import PARTS
from polymerge.methods.table import ADAPTERS, METHODS
from polymerge.planning import make_plan
from polymerge.planning.compare import inspect
from polymerge.planning.compatibility import config_warnings
from polymerge.planning.text import describe
from polymerge.planning.written_plan import written_plan
from polymerge.recipe.parsing import parse_recipe, read_recipe

__all__ = ["KINDS"]

_NAMED = (
    "tie_word_embeddings", "num_hidden_layers", "hidden_size", "vocab_size", "intermediate_size", "num_attention_heads",
    "num_key_value_heads", "head_dim", "num_experts", "num_local_experts", "architectures", "model_type", "text_config",
    "llm_config", "vision_config", "audio_config", "thinker_config", "rope_scaling", "rope_parameters", "rope_theta",
    "layer_types", "sliding_window", "torch_dtype", "dtype", "quantization_config", "cross_attention_layers",
    "auto_map", "hidden_act", "attention_bias", "mm_vision_tower", "patch_size", "image_size", "language_config",
)  # fmt: skip
"""Keys of configs that something follows from."""


@cache
def _config(family: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((seeds() / family / "config.json").read_text(encoding="utf-8"))
    return found


def _odd_config(family: str, random: Random) -> bytes:
    config = _config(family)
    if random.random() < 0.5:  # what is looked for, where it is looked for
        config = json.loads(json.dumps(config))
        levels = [config, *(one for one in config.values() if isinstance(one, dict))]
        for _ in range(random.choice((1, 1, 2, 3))):
            level, key = random.choice(levels), random.choice(_NAMED)
            if random.random() < 0.25:
                level.pop(key, None)
            else:
                other = _config(random.choice(FAMILIES))
                level[key] = odd(random) if random.random() < 0.7 or key not in other else other[key]
    else:
        config = changed(config, random)
    return to_json(config, random)


# --- config.json


def _make_config(random: Random) -> Files:
    family = random.choice(FAMILIES)
    return {"family": family.encode(), "config.json": _odd_config(family, random)}


@cache
def _shapes(name: str) -> dict[str, tuple[int, ...]]:
    checkpoint = open_checkpoint(name, seeds() / name)
    return {one: entry.shape for one, entry in checkpoint.entries.items()}


def _read_config(folder: Path) -> object:
    family = (folder / "family").read_text()
    config = read_config(folder / "config.json")
    names = _shapes(family)
    table = family_of(config)
    tower = text_tower(config, table)
    assert tower.layers is None or isinstance(tower.layers, int)
    why_quantized(config, dict.fromkeys(names, "BF16"))
    quantization_method(config)
    without_quantization(config)
    read_names(config, names)
    splits(config)
    config_dtype(config)
    json.dumps(with_rows(untied(config), 64, 65))
    list(config_warnings(("a", _config(family)), [("b", config)], PARTS))
    return list(config_warnings(("a", config), [("b", _config(family)), ("c", config)], PARTS))


def _make_config_plan(random: Random) -> Files:
    family = random.choice(FAMILIES)
    other = f"{family}-llm" if random.random() < 0.8 else random.choice(FAMILIES)
    recipe: dict[str, Any] = {
        "merge_method": random.choice(("linear", "linear", "slerp", "ties", "dare_ties", "metagpt"))
    }
    if METHODS[recipe["merge_method"]].on == "deltas":
        recipe["base_model"] = f"{PLACE}/{other}"
    recipe["models"] = [f"{PLACE}/{family}", f"{PLACE}/{other}"]
    recipe["parameters"] = {"t": 0.5} if recipe["merge_method"] == "slerp" else {"weight": 0.5}
    recipe |= random.choice(({}, {}, {"vocab": "overlap"}, {"vocab": "by-token"}, {"dtype": "float32"}))
    odd_one = random.choice((family, other))
    return {
        "recipe.json": json.dumps(recipe).encode(),
        "odd": odd_one.encode(),
        "config.json": _odd_config(odd_one, random),
    }


def _read_config_plan(folder: Path) -> object:
    recipe = json.loads(with_place((folder / "recipe.json").read_bytes()))
    name = (folder / "odd").read_text()
    (folder / name).mkdir()
    for file in (seeds() / name).iterdir():
        if file.name != "config.json":
            (folder / name / file.name).symlink_to(file)
    (folder / "config.json").rename(folder / name / "config.json")
    place = str(seeds() / name)
    recipe = json.loads(json.dumps(recipe).replace(f'"{place}"', f'"{folder / name}"'))
    plan = make_plan(recipe)
    describe(plan, full=True)
    assert written_plan(json.loads(json.dumps(plan.to_json()))) == plan, "another plan than the one written"
    return merge(plan, folder / "out", check=False, threads=1)


# --- adapters


_PREFIX = "base_model.model."


def _adapter(random: Random) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """A valid adapter of the tiny Llama, or nearly one."""
    config, tensors = dict(ADAPTER), dict(lora_tensors(2, random.choice((torch.float32, torch.bfloat16))))
    if random.random() < 0.3:
        config["modules_to_save"] = ["lm_head"]
        tensors[f"{_PREFIX}lm_head.{random.choice(('', 'modules_to_save.'))}weight"] = torch.ones(64, 32)
    if random.random() < 0.2:
        config["trainable_token_indices"] = random.choice(([1, 5], {"embed_tokens": [1, 5]}))
        tensors[f"{_PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta"] = torch.ones(2, 32)
    if random.random() < 0.2:
        tensors[f"{_PREFIX}model.embed_tokens.lora_embedding_A"] = torch.ones(2, 64)
        tensors[f"{_PREFIX}model.embed_tokens.lora_embedding_B"] = torch.ones(32, 2)
    if random.random() < 0.2:
        config["lora_bias"] = True
        tensors |= {name.replace(".weight", ".bias"): torch.ones(held.shape[0])
                    for name, held in tensors.items() if name.endswith("lora_B.weight")}  # fmt: skip
    if random.random() < 0.2:
        config["rank_pattern"] = {"q_proj": 3, r"^model\.layers\.1\..*v_proj": 1}
        config["alpha_pattern"] = {"q_proj": 1.5}
    return config, tensors


def _odd_tensors(tensors: dict[str, torch.Tensor], random: Random) -> dict[str, torch.Tensor]:
    """The same with one to three tensors renamed, left out, added, or of another shape or dtype."""
    found = dict(tensors)
    for _ in range(random.choice((1, 1, 2, 3))):
        name = random.choice(list(found)) if found else "x"
        held = found.get(name, torch.ones(1))
        other = torch.randn(random.choice(((), (0,), (1,), (2, 32), (32, 2), (0, 2), (2, 0), (1, 1, 1), (3, 5))),
                            generator=torch.Generator().manual_seed(random.randrange(99)))  # fmt: skip
        match random.randrange(7):
            case 0:
                found.pop(name, None)
            case 1:
                text = random.choice((name.replace("lora_A", "lora_B"), name + ".x", name.replace(".layers.0",
                ".layers.99999999999"),
                                      name.removeprefix(_PREFIX), name.replace("weight", "bias"),
                                      _PREFIX + random.choice(ODD_TEXTS),
                                      name.replace("lora_A", "lora_A.default"), random.choice(ODD_TEXTS)))  # fmt: skip
                found[text.encode("utf-8", "replace").decode() or "x"] = found.pop(name, held)
            case 2 | 3:
                found[name] = other
            case 4:
                kinds = (torch.float16, torch.float64, torch.int64, torch.bool, torch.float8_e4m3fn, torch.uint8)
                found[name] = held.to(random.choice(kinds))
            case 5 if held.numel():
                flat = held.detach().float().clone().reshape(-1)
                flat[0] = random.choice((float("nan"), float("inf"), 1e38, 1e-45))
                found[name] = flat.reshape(held.shape)
            case _:
                end = random.choice(("lora_A.weight", "lora_B.weight", "lora_magnitude_vector",
                "base_layer.weight",
                                     "lora_embedding_A", "modules_to_save.default.weight", "weight",
                                     "token_adapter.x"))  # fmt: skip
                found[f"{_PREFIX}model.layers.0.self_attn.{random.choice(('q_proj', 'k_proj', 'x'))}.{end}"] = other
    return found


def _saved(tensors: dict[str, torch.Tensor]) -> bytes:
    return safetensors.torch.save({name: held.clone().contiguous() for name, held in tensors.items()}, {"format": "pt"})


def _as_bin(tensors: dict[str, torch.Tensor]) -> bytes:
    stream = io.BytesIO()
    torch.save(tensors, stream)
    return stream.getvalue()


def _make_adapter(random: Random) -> Files:
    config, tensors = _adapter(random)
    which = random.randrange(4)
    said = config if which == 0 else _odd_adapter_config(config, random)
    tensors = tensors if which == 1 else _odd_tensors(tensors, random) if which in (0, 2) else tensors
    text = json.dumps(said).encode() if which == 0 else to_json(said, random)
    weights = (
        {"adapter_model.safetensors": _saved(tensors)}
        if random.random() < 0.8
        else {"adapter_model.bin": _as_bin(tensors)}
    )
    if random.random() < 0.1:
        weights = {name: odd_bytes(data, random) for name, data in weights.items()}
    return {"adapter/adapter_config.json": text, **{f"adapter/{name}": data for name, data in weights.items()}}


def _odd_adapter_config(config: dict[str, Any], random: Random) -> Any:
    if random.random() < 0.4:
        return changed(config, random)
    keys = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "modules_to_save", "target_modules", "bias",
    "peft_type",
            "trainable_token_indices", "base_model_name_or_path", "revision", "lora_dtype", "init_lora_weights",
            "use_rslora",
            "fan_in_fan_out", "layers_pattern", "use_dora", "unknown", "loftq_config")  # fmt: skip
    patterns = [{random.choice(ODD_TEXTS): random.choice((1, 2, 0, -1, 1e308, 10**30))}, {"(a+)+$": 2},
    {".*" * 30: 2},
                {"(.*)*q_proj": 2}, {"q_proj": float("nan")}, {"^(?!.*vision).*q_proj": 3},
                {"(?:" * 500: 1}]  # fmt: skip
    said = dict(config)
    for _ in range(random.choice((1, 1, 2))):
        said[random.choice(keys)] = random.choice(patterns) if random.random() < 0.3 else odd(random)
    return said


def _read_adapter(folder: Path) -> object:
    return _explained(open_adapter("x", folder / "adapter"))


def _explained(adapter: Any) -> object:
    """What is asked of an adapter once it is open."""
    return (
        [adapter.saved_apart(name) for name in adapter.parameters],
        adapter.tokens_of_tied,
        adapter.where(adapter.non_lora),
    )


def _make_adapter_merge(random: Random) -> Files:
    files = dict(_make_adapter(random))
    method = random.choice([row.name for row in METHODS.values() if row.takes_adapters and not row.copies])
    row = METHODS[method]
    parameters: dict[str, Any] = {"weight": 0.5} if row.parameter("weight") else {}
    if row.entrywise:
        parameters |= random.choice(
            ({}, {"space": "factors"}, {"space": "knots"}, {"space": "core"}, {"space": "delta"})
        )
    parameters |= random.choice(({}, {}, {"rank": random.choice((1, 2, 3, 1000))}, {"extra": "first"}))
    recipe = {"merge_method": method, "models": ["@HERE/adapter", f"{PLACE}/adapters/a"], "parameters": parameters}
    if random.random() < 0.2:
        recipe |= {"base_model": f"{PLACE}/llama"}
    return {**files, "recipe.json": json.dumps(recipe).encode()}


def _read_adapter_merge(folder: Path) -> object:
    for file in (folder / "adapter").iterdir():
        if file.suffix == ".json":
            file.write_bytes(with_place(file.read_bytes()))
    recipe = json.loads(with_place((folder / "recipe.json").read_bytes()).replace(b"@HERE", str(folder).encode()))
    plan = make_plan(recipe)
    describe(plan, full=True)
    return merge(plan, folder / "out", check=False, threads=1)


def _read_fold(folder: Path) -> object:
    plan = make_plan({"merge_method": "copy", "models": [f"{seeds()}/llama+{folder / 'adapter'}"]})
    return merge(plan, folder / "out", check=False, threads=1)


def _make_llava(random: Random) -> Files:
    config = {**ADAPTER, "base_model_name_or_path": f"{PLACE}/llava_original"}
    factors, beside = {}, {}
    for layer in range(2):
        name = f"{_PREFIX}model.layers.{layer}.self_attn.q_proj"
        factors[f"{name}.lora_A.weight"], factors[f"{name}.lora_B.weight"] = torch.ones(2, 32), torch.ones(32, 2)
    for name, shape in _shapes("llava_original").items():
        if "mm_projector" in name:
            beside[f"{_PREFIX}{name}"] = torch.ones(shape)
    config_text = json.dumps(config).encode()
    model_config = json.dumps(_config("llava_original")).encode()
    match random.randrange(6):
        case 0:
            config_text = to_json(_odd_adapter_config(config, random), random)
        case 1:
            model_config = _odd_config("llava_original", random)
        case 2:
            factors = _odd_tensors(factors, random)
        case 3 | 4:
            beside = _odd_tensors(beside, random)
    trainables = _as_bin(beside)
    if random.random() < 0.15:
        trainables = odd_bytes(trainables, random)
    factor_file = (
        ("adapter_model.bin", _as_bin(factors))
        if random.random() < 0.5
        else ("adapter_model.safetensors", _saved(factors))
    )
    name = random.choice(
        ("non_lora_trainables.bin", "non_lora_trainables.bin", "non_lora_state_dict.bin", "mm_projector.bin")
    )
    return {
        "adapter/adapter_config.json": config_text, "adapter/config.json": model_config,
        f"adapter/{factor_file[0]}": factor_file[1], f"adapter/{name}": trainables,
    }  # fmt: skip


def _read_llava(folder: Path) -> object:
    adapter = folder / "adapter"
    for file in adapter.iterdir():
        if file.suffix == ".json":
            file.write_bytes(with_place(file.read_bytes()))
    _explained(open_adapter("x", adapter))
    return inspect(f"{seeds()}/llava_original+{adapter}")


# --- recipes


def _recipe(random: Random) -> dict[str, Any]:
    """A valid recipe of most fields, or nearly one."""
    family = random.choice(FAMILIES)
    row = random.choice(list(METHODS.values()))
    count = row.models or random.choice((1, 2, 2, 3))
    known = [*row.parameters, *(ADAPTERS if random.random() < 0.1 else ())]

    def value(parameter: Any) -> Any:
        match parameter.kind:
            case "number":
                return random.choice((0, 0.5, 1, 0.3, "1e-3", 2))
            case "count":
                return random.choice((1, 2, 16))
            case "flag":
                return random.choice((True, False, 0, 1))
        return random.choice(parameter.choices)

    models = [f"{PLACE}/{family}", f"{PLACE}/{family}-llm", f"{PLACE}/{random.choice(FAMILIES)}"][:count]
    entries: list[Any] = [{"model": one} for one in models]
    parameters = {}
    for one in known:
        if one.each and random.random() < 0.5:
            for entry in entries:
                entry["parameters"] = {**entry.get("parameters", {}), one.name: value(one)}
        elif random.random() < 0.8:
            parameters[one.name] = value(one)
    recipe: dict[str, Any] = {"merge_method": row.name, "models": entries, "parameters": parameters}
    if row.on == "deltas" or random.random() < 0.1:
        recipe["base_model"] = f"{PLACE}/{family}-llm"
    optional: dict[str, Callable[[], Any]] = {
        "template": lambda: f"{PLACE}/{family}",
        "parts": lambda: random.sample(PARTS, random.choice((1, 2))),
        "exclude": lambda: random.choice((["text.layers.0.*"], "*norm*", ["*a*b*c*d*e*f*"])),
        "overrides": lambda: [
            {"layers": "0-1", "merge_method": random.choice(list(METHODS))},
            {"match": "*.mlp.*", "parameters": {"weight": [0.1, 0.9]}},
        ],
        "vocab": lambda: random.choice(("template", "overlap", "by-token")),
        "dtype": lambda: random.choice(list(NAMES)),
        "seed": lambda: random.choice((0, 42, 2**64)),
        "branches": lambda: random.choice(("fill", "retain")),
        "ignore": lambda: ["model.layers.0.*"],
    }
    for name, made in optional.items():
        if random.random() < 0.15:
            recipe[name] = made()
    if random.random() < 0.1:
        entries[0] |= random.choice(({"family": random.choice(list(TABLES))}, {"ignore": ["*rotary*"]}))
    return recipe


_YAML = (
    "&a", "*a", "<<: *a", "!!bool maybe", "!!int x", "!!float nan", "!!timestamp 2024-13-99", "2024-02-30",
    "!!binary /w==",
    "!!set {a, b}", "!!omap [a: 1]",
    "!!python/object/apply:os.system ['true']",
    f"!!python/object/apply:sys.audit ['{CANARY}']", "!!python/name:os.system", "!x y", "? [a]\n: b", "---\n",
    "...\n",
    "\t",
    "%YAML 9.9\n---\n", "[" * 400 + "]" * 400, "{" * 3000, "- " * 2000, "9" * 5000, "0b1", "0o7", "190:20:30", "~",
    "|\n  a",
    ">\n  b",
    "&a [*a]", "&a {a: *a}", "<<: [1, 2]", "<<: 1", "!!null x", '"\\ud800"', '"\\x00"', "\x07", "\ufeff", "'", '"',
    "{a: [",
    "&a [x,x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b,*b,*b,*b]\nd: &d "
    "[*c,*c,*c,*c,*c,*c,*c,*c,*c]\ne: &e [*d,*d,*d,*d,*d,*d,*d,*d,*d]\nmodels: [*e,*e,*e,*e,*e,*e,*e,*e,*e]\n",
)  # fmt: skip


def _make_recipe_text(random: Random) -> Files:
    recipe = _recipe(random)
    if random.random() < 0.4:
        recipe = changed(recipe, random)
    try:
        text = yaml.safe_dump(
            recipe, allow_unicode=True, sort_keys=False, default_flow_style=random.choice((True, False))
        )
    except (yaml.YAMLError, RecursionError, ValueError):  # what the writer has no form for
        text = json.dumps(recipe)
    for _ in range(random.choice((0, 1, 1, 2))):
        place = random.randrange(len(text) + 1)
        stops = [at for at, one in enumerate(text) if one in " \n"] or [place]
        place = random.choice(stops) + 1
        end = text.find("\n", place) if random.random() < 0.5 else place
        text = f"{text[:place]}{random.choice((*_YAML, *ODD_TEXTS))}{text[max(end, place) :]}"
    data = text.encode("utf-8", "surrogatepass")
    return {"recipe.yaml": odd_bytes(data, random) if random.random() < 0.3 else data}


def _read_recipe_text(folder: Path) -> object:
    file = folder / "recipe.yaml"
    file.write_bytes(with_place(file.read_bytes()))
    return read_recipe(file)


def _make_recipe(random: Random) -> Files:
    value = changed(_recipe(random), random) if random.random() < 0.9 else _recipe(random)
    return {"recipe.json": json.dumps(value).encode()}


def _read_recipe(folder: Path) -> object:
    recipe = json.loads(with_place((folder / "recipe.json").read_bytes()))
    return parse_recipe(recipe if isinstance(recipe, dict) else {"models": recipe})


def _read_recipe_plan(folder: Path) -> object:
    recipe = json.loads(with_place((folder / "recipe.json").read_bytes()))
    plan = make_plan(recipe if isinstance(recipe, dict) else {"models": recipe})
    return describe(plan, full=True)


# --- plans


@cache
def _plans() -> tuple[dict[str, Any], ...]:
    """Plans of checkpoints and of adapters, as they are written."""
    here = str(seeds())
    models = [f"{here}/{name}" for name in ("llama", "llama-llm", "llava", "llava-llm", "qwen3_moe", "qwen3_moe-llm")]
    recipes: list[dict[str, Any]] = [
        {"merge_method": "linear", "models": models[:2], "parameters": {"weight": 0.5}},
        {
            "merge_method": "ties",
            "models": models[2:4],
            "base_model": models[3],
            "parameters": {"weight": 1, "density": 0.5},
        },
        {"merge_method": "slerp", "models": models[4:], "parameters": {"t": 0.25}, "exclude": ["text.layers.0.*"]},
    ]
    found = [make_plan(recipe) for recipe in recipes]
    adapters = [Path(here) / "adapters" / name for name in ("a", "b")]
    found.append(
        make_plan({"merge_method": "cat", "models": [str(one) for one in adapters], "parameters": {"weight": 0.5}})
    )
    return tuple({**plan.to_json(), "hash": plan.hash} for plan in found)


def _make_plan(random: Random) -> Files:
    data = dict(random.choice(_plans()))
    if random.random() < 0.9:
        del data["hash"]  # without which it is not known to be another one
    if random.random() < 0.5:
        steps = list(data["steps"])
        place = random.randrange(len(steps))
        steps[place] = changed(steps[place], random)
        data["steps"] = steps
    else:
        data = changed(data, random)
    text = to_json(data, random) if random.random() < 0.2 else json.dumps(data).encode()
    return {"plan.json": text.replace(str(seeds()).encode(), PLACE.encode())}


def _read_plan(folder: Path) -> object:
    file = folder / "plan.json"
    file.write_bytes(with_place(file.read_bytes()))
    plan = make_plan(str(file))
    describe(plan, full=True)
    return merge(plan, folder / "out", check=False, threads=1)


# --- tokenizers


_SLOW: dict[str, Any] = {
    "vocab.json": {"<unk>": 0, "a": 1, "b": 2},
    "added_tokens.json": {"<image>": 3},
    "tokenizer_config.json": {"added_tokens_decoder": {"4": {"content": "<x>", "special": True}}, "chat_template": "x"},
}


@cache
def _sentencepiece() -> bytes:
    """A model of three pieces, as protobuf: field 1, each with a text and a score."""
    pieces = (b"<unk>", b"a", "▁b".encode())
    return b"".join(
        b"\x0a" + bytes([len(one) + 7]) + b"\x0a" + bytes([len(one)]) + one + b"\x15\x00\x00\x80\xbf" for one in pieces
    )


def _make_tokenizer(random: Random) -> Files:
    match random.randrange(5):
        case 0 | 1:
            name = random.choice(FAMILIES)
            value = json.loads((seeds() / name / "tokenizer.json").read_text(encoding="utf-8"))
            if random.random() < 0.3:
                value["model"]["vocab"] = [[token, -float(number)] for token, number in value["model"]["vocab"].items()]
            place = random.choice((value, value["model"], value))
            odd_one = changed(place, random)
            if place is not value:
                value["model"], odd_one = odd_one, value
            return {"tokenizer.json": to_json(odd_one, random)}
        case 2 | 3:
            files = {name: json.dumps(value).encode() for name, value in _SLOW.items()}
            name = random.choice(list(files))
            return {**files, name: to_json(changed(_SLOW[name], random), random)}
    return {"tokenizer.model": odd_bytes(_sentencepiece(), random)}


def _read_tokenizer(folder: Path) -> object:
    return read_tokens(folder)


KINDS = (
    Kind("config", _make_config, _read_config, 120),
    Kind("merged config", _make_config_plan, _read_config_plan, 8),
    Kind("adapter", _make_adapter, _read_adapter, 60),
    Kind("merged adapter", _make_adapter_merge, _read_adapter_merge, 8),
    Kind("folded adapter", _make_adapter, _read_fold, 8),
    Kind("LLaVA adapter", _make_llava, _read_llava, 20),
    Kind("recipe text", _make_recipe_text, _read_recipe_text, 60),
    Kind("recipe", _make_recipe, _read_recipe, 60),
    Kind("planned recipe", _make_recipe, _read_recipe_plan, 15),
    Kind("plan", _make_plan, _read_plan, 20),
    Kind("tokenizer", _make_tokenizer, _read_tokenizer, 40),
)
