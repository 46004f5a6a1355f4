"""A recipe to start from, for given models: what kind of merge it is, and what people begin with for that kind."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import yaml

from polymerge.errors import PolymergeError, RecipeError, did_you_mean
from polymerge.families.rules import PARTS
from polymerge.methods.table import METHODS
from polymerge.planning.compare import Portrait, inspect
from polymerge.planning.compatibility import router_globs
from polymerge.planning.model import EMBEDDING, HEAD
from polymerge.planning.plan import Plan
from polymerge.planning.planner import make_plan

__all__ = ["Candidates", "NewRecipe", "Start", "candidates", "new_recipe"]

Kind = Literal["llm into vlm", "architectures", "fine-tunes", "adapters"]

_TITLES: Final[Mapping[Kind, str]] = {
    "llm into vlm": "a language model into the text tower of a vision-language model",
    "architectures": "models of different architectures, joined in their text towers",
    "fine-tunes": "models of one family",
    "adapters": "LoRA adapters",
}


@dataclass(frozen=True)
class Start:
    """A method that people start from, and how.

    first   the template's weight, where it is not that of the others
    rest    the weight of each other model
    shared  whether `rest` is divided among them; without `first`, all weights are 1 / n
    """

    method: str
    why: str
    first: float | None = None
    rest: float = 1.0
    shared: bool = False
    parameters: Mapping[str, Any] = field(default_factory=dict)

    def weights(self, models: int) -> list[float] | None:
        """A weight for each model, the template's first; None where the method has no weights."""
        if not any(one.name == "weight" for one in METHODS[self.method].parameters) and self.method != "slerp":
            return None
        if self.first is None:
            return [round(self.rest / models, 4) if self.shared else self.rest] * models
        return [self.first, *[round(self.rest / (models - 1), 4) if self.shared else self.rest] * (models - 1)]


_XU: Final = "Xu et al. (ACL 2026, 2026.acl-long.571), where tuning decided"
_ADAMMS: Final = (
    "AdaMMS (Du et al., CVPR 2025): the other's weight is searched over 0 to 0.6 without labels; 0.3 is the middle"
)
_AVERAGE: Final = "what every other method has to beat (Ilharco et al. 2023; the baseline of OptMerge, ICLR 2026)"
_NO_BETTER: Final = "docs/finetunes.md: at searched scales most methods are within noise of this one"

_STARTS: Final[Mapping[tuple[Kind, bool], tuple[Start, ...]]] = {
    ("llm into vlm", False): (
        Start("linear", "0.9 for the VLM, chosen out of 0.8, 0.85 and 0.9 in Bring Reason to Vision (Chen et al., ICML "
              "2025)", 0.9, 0.1, shared=True),
        Start("slerp", "between the two on an arc instead of a line; the weight is that of linear", 0.9, 0.1),
    ),
    ("llm into vlm", True): (
        Start("task_arithmetic", f"the VLM whole, and 0.3 of the other's delta: with DARE the best of {_XU}", 1.0, 0.3),
        Start("dare_linear", f"with task arithmetic the best of {_XU}; weight and density are ours", 1.0, 0.3,
              parameters={"density": 0.5}),
        Start("linear", "0.9 for the VLM, in Bring Reason to Vision (Chen et al., ICML 2025); reads no base", 0.9, 0.1,
              shared=True),
        Start("ties", "mode ties of Bring Reason to Vision: weights 1.6 and 0.2, density 0.2", 1.6, 0.2,
              parameters={"density": 0.2, "elect": "unweighted", "normalize": "count"}),
        Start("ip_merge", "made for this use (arXiv 2510.14387); decomposes matrices, which takes time", 1.0, 1.0),
    ),
    ("architectures", False): (
        Start("linear", _ADAMMS, 0.7, 0.3, shared=True),
    ),
    ("architectures", True): (
        Start("linear", f"{_ADAMMS}; reads no base", 0.7, 0.3, shared=True),
        Start("task_arithmetic", "a baseline of AdaMMS: the mean of the deltas", shared=True),
        Start("ties", "a baseline of AdaMMS: one threshold for the whole model, density 0.5 as in its scripts",
              parameters={"density": 0.5, "trim": "model", "elect": "unweighted", "normalize": "none"}),
        Start("metagpt", "the best baseline in table 1 of AdaMMS: weights from the deltas' norms"),
    ),
    ("fine-tunes", False): (
        Start("linear", "the plain average (Model soups, Wortsman et al. 2022). With their common base there is more "
              "choice: name it as base_model", shared=True),
        Start("slerp", "of two models: halfway on an arc", 0.5, 0.5),
    ),
    ("fine-tunes", True): (
        Start("task_arithmetic", f"the mean of the deltas, {_AVERAGE}; {_NO_BETTER}", shared=True),
        Start("tsv", "TSV-M (Gargiulo et al., CVPR 2025): the one method that was better on polymerge's own three "
              "fine-tunes, at a scale of 1.2 (docs/finetunes.md)", parameters={"scale": 1.2}),
        Start("optmerge", "OptMerge (Wei et al., ICLR 2026), made for fine-tunes of one VLM; decomposes matrices, "
              "which takes time"),
        Start("ties", "TIES-Merging (Yadav et al. 2023): the largest fifth of each delta",
              parameters={"density": 0.2}),
        Start("linear", "the plain average (Model soups, Wortsman et al. 2022); reads no base", shared=True),
    ),
    ("adapters", False): (
        Start("task_arithmetic", "the mean of the updates: on polymerge's own four adapters none of 34 other merges "
              "was better beyond noise (docs/adapters.md)", shared=True),
        Start("robustmerge", "RobustMerge (Zeng et al., NeurIPS 2025), as its equations have it; its rank is their sum",
              parameters={"density": 0.2, "scale": 2, "floor": None, "compose": "product", "extra": "mean"}),
        Start("tsv", "TSV-M (Gargiulo et al., CVPR 2025)"),
        Start("ties", "TIES-Merging (Yadav et al. 2023): the largest fifth of each update",
              parameters={"density": 0.2}),
    ),
}  # fmt: skip
"""By kind, and whether a common base is given, what people start from; the first of them is taken."""


@dataclass(frozen=True)
class Candidates:
    """What given models are to each other.

    models  the template first
    resized whether embeddings and head differ in their rows
    """

    kind: Kind
    models: tuple[str, ...]
    base: str | None
    starts: tuple[Start, ...]
    resized: bool

    @property
    def title(self) -> str:
        """The kind of merge, in words."""
        return _TITLES[self.kind]


@dataclass(frozen=True)
class NewRecipe:
    """A recipe with comments, and the plan that it gives; `varied` is the parameter to search."""

    text: str
    plan: Plan
    chosen: Start
    candidates: Candidates
    varied: str

    def to_json(self) -> dict[str, Any]:
        """The recipe, the kind of merge, and the methods that people start from."""
        return {
            "kind": self.candidates.kind,
            "recipe": dict(self.plan.recipe),
            "method": self.chosen.method,
            "why": self.chosen.why,
            "others": {one.method: one.why for one in self.candidates.starts if one is not self.chosen},
            "warnings": list(self.plan.warnings),
            "plan_hash": self.plan.hash,
        }


def candidates(
    models: Sequence[str | os.PathLike[str]],
    base: str | os.PathLike[str] | None = None,
    template: str | os.PathLike[str] | None = None,
) -> Candidates:
    """Look at the headers of models, and find out what kind of merge they make.

    models    folders, files or hub ids, two or more; all of them adapters, or none
    base      the common ancestor of models that are no adapters, if there is one
    template  the one of `models` whose layout the output takes; by default the first multimodal one, or the first

    raises Refused with every model that cannot be opened, RecipeError if they make no merge.
    """
    given = [os.fspath(one) for one in models]
    if len(given) < 2:
        raise RecipeError("say which models to merge, two or more")
    if len(set(given)) < len(given):
        raise RecipeError(f"{next(one for one in given if given.count(one) > 1)} is named twice")
    if template is not None and os.fspath(template) not in given:
        raise RecipeError(f"template: '{template}' is none of the models.{did_you_mean(os.fspath(template), given)}")
    named = None if base is None else os.fspath(base)
    opened = [*given, *([named] if named is not None and named not in given else [])]
    found = inspect(*opened)
    adapters = {one.adapter for one in found.adapters}
    own = dict(zip([one for one in opened if one not in adapters], found.models, strict=True))
    if found.adapters and own.keys() & set(given):
        raise RecipeError(
            f"{found.adapters[0].adapter} is an adapter and {next(iter(own))} is not: merge adapters with each other, "
            "or name BASE+ADAPTER to fold it in first"
        )
    first = _template(given, own) if template is None else os.fspath(template)
    ordered = (first, *(one for one in given if one != first))
    if found.adapters:
        return Candidates("adapters", ordered, named, _fitting("adapters", False, len(ordered)), resized=False)
    portraits = [own[one] for one in ordered]
    kind = _kind(portraits)
    resized = len({one.vocabulary for one in portraits}) > 1
    return Candidates(kind, ordered, named, _fitting(kind, base is not None, len(ordered)), resized)


def new_recipe(
    models: Sequence[str | os.PathLike[str]] | Candidates,
    *,
    base: str | os.PathLike[str] | None = None,
    template: str | os.PathLike[str] | None = None,
    method: str | None = None,
) -> NewRecipe:
    """A recipe for given models that plans, by what people start from for that kind of merge.

    models, base, template   as for `candidates`, or what that has found
    method                   another of those that people start from; by default the first

    raises Refused with every problem of the models and between them.
    """
    found = models if isinstance(models, Candidates) else candidates(models, base, template)
    known = {one.method: one for one in found.starts}
    if method is not None and method not in known:
        with_base = "" if found.base or found.kind == "adapters" else ". Those that work on deltas need `base`"
        raise RecipeError(
            f"method: '{method}' is none that people start from for {found.title}"
            f"{with_base}.{did_you_mean(method, known)}"
        )
    chosen = found.starts[0] if method is None else known[method]
    recipe = _recipe(found, chosen)
    try:
        plan = make_plan(recipe)
    except PolymergeError as error:
        if found.kind == "adapters":
            raise
        try:
            plan = make_plan(recipe := {**recipe, "missing": "copy"})
        except PolymergeError:
            raise error from None
    names = [piece.canonical for step in plan.steps for piece in step.pieces]
    merged = [piece.canonical for _, piece, _ in plan.merged_pieces()]
    if routers := [*router_globs(merged, names)]:
        recipe["exclude"] = [*recipe.get("exclude", ()), *routers]
        plan = make_plan(recipe)
    text = "\n".join([*_lines(found, chosen, recipe), ""])
    return NewRecipe(text, plan, chosen, found, _varied(found, chosen))


def _multimodal(one: Portrait) -> bool:
    return bool(one.parts.keys() & set(PARTS) - {"text"})


def _template(given: Sequence[str], own: Mapping[str, Portrait]) -> str:
    return next((one for one in given if one in own and _multimodal(own[one])), given[0])


def _kind(portraits: Sequence[Portrait]) -> Kind:
    template, *others = portraits
    if _multimodal(template) and not any(map(_multimodal, others)):
        return "llm into vlm"
    return "fine-tunes" if len({one.family for one in portraits}) == 1 else "architectures"


def _fitting(kind: Kind, based: bool, models: int) -> tuple[Start, ...]:
    """What people start from for that many models."""
    return tuple(one for one in _STARTS[kind, based] if METHODS[one.method].models in (None, models))


def _recipe(found: Candidates, chosen: Start) -> dict[str, Any]:
    weights = chosen.weights(len(found.models))
    data: dict[str, Any] = {"merge_method": chosen.method, "template": found.models[0]}
    if METHODS[chosen.method].reads_base and found.base is not None:
        data["base_model"] = found.base
    data["models"] = [
        {"model": model, **({"parameters": {"weight": weights[place]}} if weights else {})}
        for place, model in enumerate(found.models)
    ]
    if chosen.parameters:
        data["parameters"] = dict(chosen.parameters)
    if found.kind in ("llm into vlm", "architectures"):
        data["parts"] = ["text"]
    if found.kind == "llm into vlm" or found.resized:
        data["exclude"] = [EMBEDDING, HEAD]
    return data


_COMMENTS: Final = {
    "template": "whose layout, config, tokenizer and processor the output takes",
    "base_model": "the common ancestor, from which deltas are taken",
    "parts": "all else, such as vision tower and projector, stays the template's",
    "missing": "tensors that a model lacks stay the template's",
}


def _lines(found: Candidates, chosen: Start, recipe: Mapping[str, Any]) -> Iterator[str]:
    """The recipe as YAML, with what it is, where it is from, and what to try next."""
    yield from _comment(
        f"{found.title[0].upper()}{found.title[1:]}, by `{chosen.method}`: {METHODS[chosen.method].title}."
    )
    yield from _comment(f"Where to start: {chosen.why}.")
    if found.kind == "llm into vlm":
        yield from _comment(
            "Is the language model a fine-tune of this model's own text tower? Then list it alone, with weight 1."
        )
        if found.base is None:
            yield from _comment("With the common base of both named as base_model, there are methods on deltas, too.")
    why = "rows of a vocabulary that was resized" if found.resized else "as in Bring Reason to Vision"
    for name, value in recipe.items():
        if name == "models":
            yield "models:"
            for entry in value:
                yield f"  - model: {_scalar(entry['model'])}"
                if "parameters" in entry:
                    yield f"    parameters: {_scalar(entry['parameters'])}"
        else:
            routers = " and routers of experts" if name == "exclude" and set(value) - {EMBEDDING, HEAD} else ""
            said = f"{why}{routers}: the template's are kept" if name == "exclude" else _COMMENTS.get(name, "")
            yield f"{name}: {_scalar(value)}{f'  # {said}' if said else ''}"
    for one in found.starts:
        if one is not chosen:
            yield from _comment(f"Or {one.method}: {one.why}.")
    varied = _varied(found, chosen)
    yield from _comment(
        f"No number is right for every pair: `polymerge search` varies {varied} by prompts of your own."
    )


def _varied(found: Candidates, chosen: Start) -> str:
    """The parameter to search: how much of the others a VLM takes, or the size of the whole update."""
    scales = any(one.name == "scale" for one in METHODS[chosen.method].parameters)
    return "scale" if scales and (found.kind in ("fine-tunes", "adapters") or len(found.models) > 2) else "weight"


def _scalar(value: object) -> str:
    """A value in YAML, on one line."""
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, allow_unicode=True, width=1 << 20)
    return text.strip().removesuffix("\n...").strip()


def _comment(text: str) -> Iterator[str]:
    """Lines of a comment, no longer than a screen is wide."""
    line = "#"
    for word in text.split():
        if len(line) + len(word) >= 120:
            yield line
            line = "#"
        line += f" {word}"
    yield line
