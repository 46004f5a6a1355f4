"""Merge multimodal language models without training.

    import polymerge as pm

    pm.inspect("vlm", "llm")                      # what they are, and whether they can be merged
    plan = pm.plan("recipe.yaml")                 # every tensor's fate, from headers alone
    with pm.live(plan) as merged:                 # the merged model in memory, as transformers loads it
        merged.model.generate(...)
    merged = pm.merge(plan, "merged")             # the same on disk, checked
    found = pm.search("recipe.yaml", "prompts.jsonl", "run")
    found.best, found.curve, found.recipe
    scores = pm.evaluate(merged.folder, "prompts.jsonl", "scores", scorer="exact")
    pm.report([merged, found, scores], "report.html")

A recipe is a file, a mapping of the same form or a `Recipe`. Results are shown as tables in a notebook and have
`to_pandas()`; those that were written to a folder have `folder`. Errors are `PolymergeError`s with all `problems`.
Importing polymerge imports none of what these need; each is loaded when it is first asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from polymerge.analysis.knockout import knockout
    from polymerge.analysis.layerwise import layerwise
    from polymerge.analysis.overlap import overlap
    from polymerge.analysis.replacements import Replacement
    from polymerge.analysis.suggested import suggest
    from polymerge.engine.extract import extract
    from polymerge.engine.installation import doctor
    from polymerge.engine.merge import Merged, fold, merge
    from polymerge.engine.pushing import push
    from polymerge.engine.verify import Verification, verify
    from polymerge.errors import PolymergeError
    from polymerge.evaluation.comparison import compare_files as compare
    from polymerge.evaluation.evaluating import evaluate
    from polymerge.families.registry import FAMILIES
    from polymerge.inference.generation import Generation
    from polymerge.inference.live import live
    from polymerge.inference.programs.comparing import verify_with
    from polymerge.inference.prompts import PromptSource
    from polymerge.methods.method import Method, Parameter
    from polymerge.methods.table import METHODS
    from polymerge.planning import Plan
    from polymerge.planning import make_plan as plan
    from polymerge.planning.compare import inspect
    from polymerge.planning.first_recipe import new_recipe
    from polymerge.recipe.parsing import read_recipe
    from polymerge.recipe.recipe import ModelEntry, Override, Recipe
    from polymerge.reporting.reports import report
    from polymerge.tuning.criterion import Judging
    from polymerge.tuning.knobs import Knob
    from polymerge.tuning.search import search
    from polymerge.tuning.search_options import SearchOptions
    from polymerge.tuning.trials import Scoring

__all__ = [
    "FAMILIES",
    "METHODS",
    "Generation",
    "Judging",
    "Knob",
    "Merged",
    "Method",
    "ModelEntry",
    "Override",
    "Parameter",
    "Plan",
    "PolymergeError",
    "PromptSource",
    "Recipe",
    "Replacement",
    "Scoring",
    "SearchOptions",
    "Verification",
    "compare",
    "doctor",
    "evaluate",
    "extract",
    "fold",
    "inspect",
    "knockout",
    "layerwise",
    "live",
    "merge",
    "new_recipe",
    "overlap",
    "plan",
    "push",
    "read_recipe",
    "report",
    "search",
    "suggest",
    "verify",
    "verify_with",
]

_HOMES = {
    "FAMILIES": "families.registry",
    "METHODS": "methods.table",
    "Generation": "inference.generation",
    "Judging": "tuning.criterion",
    "Knob": "tuning.knobs",
    "Merged": "engine.merge",
    "Method": "methods.method",
    "ModelEntry": "recipe.recipe",
    "Override": "recipe.recipe",
    "Parameter": "methods.method",
    "Plan": "planning",
    "PolymergeError": "errors",
    "PromptSource": "inference.prompts",
    "Recipe": "recipe.recipe",
    "Replacement": "analysis.replacements",
    "Scoring": "tuning.trials",
    "SearchOptions": "tuning.search_options",
    "Verification": "engine.verify",
    "compare": "evaluation.comparison:compare_files",
    "doctor": "engine.installation",
    "evaluate": "evaluation.evaluating",
    "extract": "engine.extract",
    "fold": "engine.merge",
    "inspect": "planning.compare",
    "knockout": "analysis.knockout",
    "layerwise": "analysis.layerwise",
    "live": "inference.live",
    "merge": "engine.merge",
    "new_recipe": "planning.first_recipe",
    "overlap": "analysis.overlap",
    "plan": "planning:make_plan",
    "push": "engine.pushing",
    "read_recipe": "recipe.parsing",
    "report": "reporting.reports",
    "search": "tuning.search",
    "suggest": "analysis.suggested",
    "verify": "engine.verify",
    "verify_with": "inference.programs.comparing",
}
"""The module of each public name, and its name there if it differs."""


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'polymerge' has no attribute '{name}'")
    module, _, own = _HOMES[name].partition(":")
    return getattr(import_module(f"polymerge.{module}"), own or name)


def __dir__() -> list[str]:
    return __all__
