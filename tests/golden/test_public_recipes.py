"""The kinds of recipes on public model cards, written anew for tiny models: each runs, and gives what a literal
computation of it gives, or what mergekit gave.

49 published recipes were read for what they are made of: methods, and the forms in which their numbers, layers, dtypes,
names and tokenizers are said. Here is one recipe of each kind, with models that have 4 layers and one vocabulary.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from numpy.typing import NDArray
from safetensors.torch import load_file

import polymerge
from literal_methods import drawn, elected, largest, on_the_arc
from paths import GOLDEN
from polymerge.errors import Refused
from polymerge.families.rules import text_layer
from polymerge.methods.table import METHODS
from polymerge.recipe.parsing import read_recipe

MERGEKIT = GOLDEN / "mergekit"
MODELS = ("base", "a", "b", "c")
LAYERS = 4
Array = NDArray[Any]
Merged = Callable[["Place"], Array]
"""What a recipe makes of a tensor."""


@dataclass(frozen=True)
class Place:
    """A tensor: its name, and its values in every model, flat and in float64."""

    name: str
    values: dict[str, Array]

    @property
    def canonical(self) -> str:
        return f"text.{self.name.removeprefix('model.')}"

    def graded(self, numbers: Sequence[float]) -> float:
        """The number of a gradient in the tensor's layer; the first outside of the layers."""
        layer = text_layer(self.canonical)
        return float(np.interp((layer or 0) / (LAYERS - 1), np.linspace(0, 1, len(numbers)), numbers))

    def filtered(self, attention: Sequence[float], mlp: Sequence[float], rest: float) -> float:
        return self.graded(attention if "self_attn" in self.name else mlp if "mlp" in self.name else [rest])

    def deltas(self, *models: str) -> list[Array]:
        return [self.values[model] - self.values["base"] for model in models]


def linear(weights: Callable[[Place], Sequence[float]], *models: str, normalize: bool = True) -> Merged:
    def merged(place: Place) -> Array:
        own = weights(place)
        total = sum(own) if normalize else 1.0
        return sum(weight * place.values[model] for weight, model in zip(own, models, strict=True)) / total

    return merged


def added(weights: Sequence[float], *models: str, scale: float = 1.0, normalize: bool = False) -> Merged:
    def merged(place: Place) -> Array:
        total = sum(weights) if normalize else 1.0
        deltas = place.deltas(*models)
        return place.values["base"] + scale * sum(w * d for w, d in zip(weights, deltas, strict=True)) / total

    return merged


def ties(
    weights: Callable[[Place], Sequence[float]],
    densities: Callable[[Place], Sequence[float]],
    *models: str,
    normalize: bool = True,
    scale: float = 1.0,
) -> Merged:
    def merged(place: Place) -> Array:
        kept = [largest(delta, own) for delta, own in zip(place.deltas(*models), densities(place), strict=True)]
        joined = elected(kept, weights(place), "weighted", "weight" if normalize else "none")
        return place.values["base"] + scale * joined

    return merged


def dare(
    weights: Callable[[Place], Sequence[float]],
    densities: Callable[[Place], Sequence[float]],
    *models: str,
    elects: bool = True,
    normalize: bool = False,
    places: Sequence[int] = (),
) -> Merged:
    """What dare_ties gives, or dare_linear; `places` are those of the models in the recipe, by which they draw."""

    def merged(place: Place) -> Array:
        own, places_ = weights(place), places or range(len(models))
        kept = [
            drawn(delta, density, True, 42, number, place.canonical)
            for delta, density, number in zip(place.deltas(*models), densities(place), places_, strict=True)
        ]
        if elects:
            return place.values["base"] + elected(kept, own, "weighted", "weight" if normalize else "none")
        total = sum(own) if normalize else 1.0
        return place.values["base"] + sum(w * d for w, d in zip(own, kept, strict=True)) / total

    return merged


def slerp(t: Callable[[Place], float], one: str = "a", other: str = "b") -> Merged:
    return lambda place: on_the_arc([place.values[one], place.values[other]], t(place))


def same(*numbers: float) -> Callable[[Place], Sequence[float]]:
    return lambda _: numbers


PIPE = ([0, 0.5, 0.3, 0.7, 1], [1, 0.5, 0.7, 0.3, 0])
"""Gradients by which many recipes take attention from one model and MLPs from the other, layer by layer."""
T = (
    "{t: [{filter: self_attn, value: [0, 0.5, 0.3, 0.7, 1]}, {filter: mlp, value: [1, 0.5, 0.7, 0.3, 0]},"
    " {value: 0.5}]}"
)
BOTH = "[{model: a, layer_range: [0, 4]}, {model: b, layer_range: [0, 4]}]"


def piped(place: Place) -> float:
    return place.filtered(*PIPE, 0.5)


def in_slices(place: Place, *weights: Sequence[float]) -> Sequence[float]:
    """The weights of a tensor's slice: two layers each, the first for what is before, the last for what follows."""
    layer = text_layer(place.canonical)
    if layer is None:
        return weights[0] if "embed" in place.name else weights[-1]
    return weights[layer // 2]


TWO = (
    "models: [{model: a, parameters: {weight: 0.5, density: 0.53}},"
    " {model: b, parameters: {weight: 0.3, density: 0.6}}]"
)
DROP, TRIM = (f"{TWO}\nbase_model: base\nmerge_method: {method}\n" for method in ("dare_ties", "ties"))
PIPED = f"slices: [{{sources: {BOTH}}}]\nmerge_method: slerp\n"
FULL = TWO.replace("0.53", "1").replace("0.6}", "1}")
PLAIN = "models: [{model: a, parameters: {weight: 0.5}}, {model: b, parameters: {weight: 0.3}}]"
DARE = dare(same(0.5, 0.3), same(0.53, 0.6), "a", "b")
TIES = ties(same(0.5, 0.3), same(0.53, 0.6), "a", "b")
TIES_1 = ties(same(0.5, 0.3), same(0.53, 0.6), "a", "b", normalize=False)
SUM = added([0.5, 0.3], "a", "b")
MEAN = linear(same(0.5, 0.3), "a", "b")

KINDS: dict[str, tuple[str, str | Callable[[Place], Array]]] = {
    # slerp
    "pipe": (f"{PIPED}base_model: a\nparameters: {T}\ndtype: float32",
             slerp(piped)),
    "pipe, base second": (f"{PIPED}base_model: b\nparameters: {T}",
                          slerp(lambda place: 1 - piped(place))),
    "pipe with a tokenizer": (f"{PIPED}base_model: a\nparameters: {T}\n"
                              "tokenizer_source: union", slerp(piped)),
    "pipe, t in the slice": (f"slices: [{{sources: {BOTH}, parameters: {T}}}]\nmerge_method: slerp\nbase_model: a",
                             slerp(piped)),
    "half way": ("models: [{model: a}, {model: b}]\nmerge_method: slerp\nbase_model: a\nparameters: {t: 0.5}",
                 slerp(lambda _: 0.5)),
    "one model beside the base": ("models: [{model: b}]\nmerge_method: slerp\nbase_model: a\nparameters: {t: 0.3}",
                                  slerp(lambda _: 0.3)),
    "a gradient of t": ("models: [{model: a}, {model: b}]\nmerge_method: slerp\nbase_model: a\n"
                        "parameters: {t: [0, 0.5, 1, 0.5, 0]}\ndtype: float32",
                        slerp(lambda place: place.graded([0, 0.5, 1, 0.5, 0]))),
    "t with a flag beside": ("models: [{model: a}, {model: b}]\nmerge_method: slerp\nbase_model: a\n"
                             "parameters: {t: 0.35, normalize: 1.0}", slerp(lambda _: 0.35)),
    # dare_ties
    "drop": (f"{DROP}parameters: {{int8_mask: true}}\ndtype: float32", DARE),
    "drop, base listed": ("models: [{model: base}, {model: a, parameters: {weight: 0.5, density: 0.53}},"
                          " {model: b, parameters: {weight: 0.3, density: 0.6}}]\nmerge_method: dare_ties\n"
                          "base_model: base", dare(same(0.5, 0.3), same(0.53, 0.6), "a", "b", places=(1, 2))),
    "drop, normalized by 1.0": (f"{DROP}parameters: {{normalize: 1.0}}",
                                dare(same(0.5, 0.3), same(0.53, 0.6), "a", "b", normalize=True)),
    "drop with a tokenizer of the union": (f"{DROP}tokenizer_source: union",
                                           DARE),
    "drop with a tokenizer of the base": (f"{DROP}tokenizer: {{source: base}}",
                                          DARE),
    "drop with a chat template": (f"{DROP}tokenizer_source: base\n"
                                  "chat_template: auto", DARE),
    "drop, numbers by depth": ("models: [{model: a, parameters: {weight: [0, 0.3, 0.7, 1], density: [1, 0.5]}},"
                               " {model: b, parameters: {weight: 0.3, density: 0.6}}]\nmerge_method: dare_ties\n"
                               "base_model: base",
                               dare(lambda place: (place.graded([0, 0.3, 0.7, 1]), 0.3),
                                    lambda place: (place.graded([1, 0.5]), 0.6), "a", "b")),
    "drop, out_dtype": (f"{DROP}dtype: float32\nout_dtype: float32", DARE),
    "drop in a slice": ("slices: [{sources: [{model: base, layer_range: [0, 4]}, {model: a, layer_range: [0, 4],"
                        " parameters: {weight: 0.5, density: 0.53}}, {model: b, layer_range: [0, 4],"
                        " parameters: {weight: 0.3, density: 0.6}}]}]\nmerge_method: dare_ties\nbase_model: base",
                        dare(same(0.5, 0.3), same(0.53, 0.6), "a", "b", places=(1, 2))),
    # ties
    "trim": (f"{TRIM}parameters: {{normalize: true, int8_mask: true}}", TIES),
    "trim, by filters and by depth": (
        "models: [{model: a, parameters: {density: [1, 0.7, 0.1], weight: 1}}, {model: b, parameters: {density: 0.33,"
        " weight: [{filter: mlp, value: 0.5}, {value: 0}]}}]\nmerge_method: ties\nbase_model: base\n"
        "parameters: {normalize: true, int8_mask: true}\ndtype: float32",
        ties(lambda place: (1, 0.5 if "mlp" in place.name else 0), lambda place: (place.graded([1, 0.7, 0.1]), 0.33),
             "a", "b"),
    ),
    "trim, not normalized": (f"{TRIM}parameters: {{normalize: 0.0}}", TIES_1),
    "trim, a flag as a text": (f'{TRIM}parameters: {{normalize: "false"}}', TIES_1),
    "trim, three models and lambda": (
        "models: [a, b, c]\nmerge_method: ties\nbase_model: base\nparameters: {weight: 1, density: 0.5, lambda: 0.7}",
        ties(same(1, 1, 1), same(0.5, 0.5, 0.5), "a", "b", "c", scale=0.7)),
    "trim with a tokenizer": (f"{TRIM}tokenizer_source: a", TIES),
    "trim in slices": (
        "slices:\n- sources: [{model: a, layer_range: [0, 2], parameters: {weight: 0.5}}, {model: b, layer_range:"
        " [0, 2], parameters: {weight: 0.4}}]\n- sources: [{model: a, layer_range: [2, 4], parameters: {weight: 0.1}},"
        " {model: b, layer_range: [2, 4], parameters: {weight: 0.9}}]\nmerge_method: ties\nbase_model: base\n"
        "parameters: {density: 0.5}",
        ties(lambda place: in_slices(place, (0.5, 0.4), (0.1, 0.9)), same(0.5, 0.5), "a", "b")),
    "trim with a name": (f"name: mix\n{TRIM}dtype: float32", TIES),
    # task_arithmetic
    "sum": (f"{PLAIN}\nmerge_method: task_arithmetic\nbase_model: base", SUM),
    "sum, normalized": (f"{PLAIN}\nmerge_method: task_arithmetic\nbase_model: base\nparameters: {{normalize: true}}",
                        added([0.5, 0.3], "a", "b", normalize=True)),
    "sum with a density": (f"{TWO}\nmerge_method: task_arithmetic\nbase_model: base\nparameters: {{lambda: 2}}",
                           added([0.5, 0.3], "a", "b", scale=2.0)),
    "sum with a chat template": (f"{PLAIN}\nmerge_method: task_arithmetic\nbase_model: base\nchat_template: auto", SUM),
    # linear
    "mean": (f"{PLAIN}\nmerge_method: linear\ndtype: float32", MEAN),
    "mean with t": (f"{PLAIN}\nmerge_method: linear\nparameters: {{t: 0.5}}", MEAN),
    "mean in slices": (
        "slices:\n- sources: [{model: a, layer_range: [0, 2]}, {model: b, layer_range: [0, 2]}]\n"
        "  parameters: {weight: 1}\n- sources: [{model: a, layer_range: [2, 4], parameters: {weight: 3}},"
        " {model: b, layer_range: [2, 4]}]\n"
        "  parameters: {weight: 1}\nmerge_method: linear",
        linear(lambda place: in_slices(place, (1, 1), (3, 1)), "a", "b")),
    "mean of a module": ("modules: {default: {slices: [{sources: [{model: a, layer_range: [0, 4], parameters:"
                         " {weight: 0.5}}, {model: b, layer_range: [0, 4], parameters: {weight: 0.3}}]}]}}\n"
                         "merge_method: linear", MEAN),
    # dare_linear
    "drop and sum": (f"{TWO}\nmerge_method: dare_linear\nbase_model: base",
                     dare(same(0.5, 0.3), same(0.53, 0.6), "a", "b", elects=False)),
    "drop and sum with mappings": (
        "models: [{model: {model: {path: a}}, parameters: {weight: 0.5, density: 0.53}}, {model: {path: b}, parameters:"
        " {weight: 0.3, density: 0.6}}]\nmerge_method: dare_linear\nbase_model: {model: {path: base}}\n"
        "tokenizer_source: base", dare(same(0.5, 0.3), same(0.53, 0.6), "a", "b", elects=False)),
    # other methods
    "stock": ("models: [a, b, c]\nmerge_method: model_stock\nbase_model: base\ndtype: float32", "model_stock"),
    "stock with weights": ("models: [a, b, c]\nmerge_method: model_stock\nbase_model: base\nparameters: {weight: 1}",
                           "model_stock"),
    "stock, filter_wise as 0": ("models: [a, b, c]\nmerge_method: model_stock\nbase_model: base\n"
                                "parameters: {filter_wise: 0.0}\nout_dtype: float32", "model_stock"),
    "stock with a tokenizer": ("models: [a, b, c]\nmerge_method: model_stock\nbase_model: base\ntokenizer_source: base",
                               "model_stock"),
    "della": (f"{FULL}\nmerge_method: della\nbase_model: base\nparameters: {{normalize: false}}",
              ties(same(0.5, 0.3), same(1, 1), "a", "b", normalize=False)),
    "della with a tokenizer": (f"{FULL}\nmerge_method: della\nbase_model: base\nparameters: {{normalize: true}}\n"
                               "tokenizer_source: base",
                               ties(same(0.5, 0.3), same(1, 1), "a", "b")),
    "della_linear": (f"{FULL}\nmerge_method: della_linear\nbase_model: base\nparameters: {{normalize: false}}", SUM),
    "nuslerp": ("", "nuslerp"), "sce": ("", "sce"), "breadcrumbs": ("", "breadcrumbs"), "karcher": ("", "karcher"),
    "arcee_fusion": ("", "arcee_fusion"),
    # passthrough
    "layers side by side": (
        "slices: [{sources: [{model: a, layer_range: [0, 2]}]}, {sources: [{model: b, layer_range: [2, 4]}]}]\n"
        "merge_method: passthrough\ndtype: float32",
        linear(lambda place: in_slices(place, (1, 0), (0, 1)), "a", "b")),
    "layers twice": ("slices: [{sources: [{model: a, layer_range: [0, 3]}]},"
                     " {sources: [{model: b, layer_range: [1, 4]}]}]\nmerge_method: passthrough", "refused"),
}  # fmt: skip

OTHER_DEPTH = ("layers twice",)
"""Kinds whose output has other layers than its models."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("public")
    for name in MODELS:
        shutil.copytree(MERGEKIT / "models" / name, folder / name)
    return folder


def recipe_of(kind: str, place: Path) -> dict[str, Any]:
    """A recipe with its models found."""
    text, expected = KINDS[kind]
    said = yaml.safe_load(text or (MERGEKIT / str(expected) / "recipe.yml").read_text())

    def found(value: Any, field: str = "") -> Any:
        if isinstance(value, dict):
            return {name: found(one, name) for name, one in value.items()}
        if isinstance(value, list):
            return [found(one, field) for one in value]
        known = field in ("model", "models", "base_model", "path", "tokenizer_source")
        return (
            str(place / value)
            if known and value in MODELS and (field, value) != ("tokenizer_source", "base")
            else value
        )

    moved: dict[str, Any] = found(said)
    return moved


def waits(recipe: dict[str, Any]) -> str:
    """The field or method that polymerge does not have, and then refuses by name; empty if there is none."""
    if recipe["merge_method"] not in METHODS and recipe["merge_method"] != "passthrough":
        return recipe["merge_method"]
    for field in ("tokenizer_source", "tokenizer", "chat_template"):
        if field in recipe:
            try:
                read_recipe({"merge_method": "linear", "models": ["a", "b"], field: recipe[field]})
            except Refused:
                return field
    return ""


def test_there_are_49_of_them() -> None:
    assert len(KINDS) == 49


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in OTHER_DEPTH])
def test_it_gives_what_is_said(kind: str, place: Path, tmp_path: Path) -> None:
    recipe, expected = recipe_of(kind, place), KINDS[kind][1]
    if lacking := waits(recipe):
        with pytest.raises(Refused, match=f"'{lacking}' is not supported"):
            polymerge.merge(recipe, tmp_path / "out", check=False)
        return
    polymerge.merge(recipe, tmp_path / "out", check=False)
    ours = load_file(tmp_path / "out/model.safetensors")
    values = {model: load_file(place / model / "model.safetensors") for model in MODELS}
    base = read_recipe(recipe).base_model
    start = Path(base) if base else place / "a"
    assert ours.keys() == values["a"].keys()
    for name, tensor in ours.items():
        held = {model: values[model][name].double().numpy().ravel() for model in MODELS}
        if isinstance(expected, str):
            wanted = load_file(MERGEKIT / expected / "expected.safetensors")[name].double().numpy().ravel()
        else:
            wanted = expected(Place(name, held))
        change = np.linalg.norm(wanted - held[start.name])
        rounding = 2.0**-23 * np.linalg.norm(wanted)
        assert np.linalg.norm(tensor.double().numpy().ravel() - wanted) <= 1e-5 * change + rounding, name


@pytest.mark.parametrize("kind", OTHER_DEPTH)
def test_other_layers_are_refused_with_the_way_out(kind: str, place: Path, tmp_path: Path) -> None:
    with pytest.raises(Refused, match="these slices repeat or move layers") as refused:
        polymerge.merge(recipe_of(kind, place), tmp_path / "out")
    assert len(refused.value.problems) == 1
