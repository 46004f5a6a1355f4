"""Plans: every tensor of every input has one fate, the one that the recipe asks for."""

from __future__ import annotations

import json
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import polymerge
from headers_only import canonical, is_buffer
from plans import EMBEDDING, HEAD, MODELS, check_account, model_folders, names_in, reads_of, recipe_of
from polymerge.errors import Refused
from polymerge.families.expressions import Rows, names_read


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return model_folders(tmp_path_factory.mktemp("models"))


SEEING = ("*.bias", "vision.*")
GLOBS = (EMBEDDING, HEAD, "text.layers.*.mlp.*", "text.layers.1.*", "text.norm.weight", "*q_proj*", *SEEING)
"""What recipes exclude or override; the last two name tensors that only a VLM has."""

method = st.sampled_from(["copy", "linear", "ties"])
layers, match = st.sampled_from(["0", "0-1", 1]), st.sampled_from(GLOBS)
override = (
    st.fixed_dictionaries({"merge_method": method, "layers": layers})
    | st.fixed_dictionaries({"merge_method": method, "match": match})
    | st.fixed_dictionaries({"merge_method": method, "layers": layers, "match": match})
)

ROWS = {"vlm": 16, "tuned": 16, "llm": 16, "wide": 20, "tied": 16, "base": 12}
VLMS = ("vlm", "tuned")


@dataclass
class Asked:
    """A recipe, and what it asks for a tensor, said the plain way."""

    models: list[str]
    template: str | None
    method: str
    parts: list[str] | None
    exclude: list[str]
    overrides: list[dict[str, Any]]
    vocab: str
    dtype: str | None

    @property
    def deltas(self) -> bool:
        return self.method != "linear" or any(override["merge_method"] == "ties" for override in self.overrides)

    @property
    def first(self) -> str:
        """The template."""
        first = self.models[0] if self.method == "linear" else "base"
        return self.template or next((name for name in self.models if name in VLMS), first)

    @property
    def readers(self) -> set[str]:
        return {self.first, *self.models} | ({"base"} if self.deltas else set())

    @property
    def text_only(self) -> bool:
        return any(name not in VLMS for name in self.readers)

    def possible(self) -> bool:
        """Whether every model has the parts, and some model has what each glob names."""
        globs = {*self.exclude, *(override.get("match") for override in self.overrides)}
        sees = any(name in VLMS for name in self.readers)
        return not (self.text_only and set(self.parts or ["text"]) != {"text"}) and (sees or globs.isdisjoint(SEEING))

    def recipe(self, folders: dict[str, str]) -> dict[str, Any]:
        said = {"parts": self.parts, "exclude": self.exclude, "overrides": self.overrides, "vocab": self.vocab,
                "dtype": self.dtype, "template": folders[self.template] if self.template else None}  # fmt: skip
        fields = {name: value for name, value in said.items() if value is not None}
        return recipe_of(folders, self.method, self.models, with_base=self.deltas, **fields)

    def method_for(self, name: str) -> str:
        """The method of the first override that is for a tensor, or the recipe's."""
        layer = int(name.split(".")[2]) if name.startswith("text.layers.") else None
        for override in self.overrides:
            first, _, last = str(override.get("layers", "")).partition("-")
            here = not first or (layer is not None and int(first) <= layer <= int(last or first))
            if here and fnmatchcase(name, override.get("match", "*")):
                return str(override["merge_method"])
        return self.method

    def rows(self, name: str) -> set[int]:
        """How many rows those have that a tensor of the vocabulary is merged from."""
        base = {"base"} if self.method_for(name) not in ("linear", "copy") else set()
        return {ROWS[model] for model in {self.first, *self.models} | base}

    def merges(self, name: str) -> bool:
        joined = self.parts or (["text"] if self.text_only else ["text", "vision", "projector"])
        if name.split(".")[0] not in joined or any(fnmatchcase(name, glob) for glob in self.exclude):
            return False
        fits = name not in (HEAD, EMBEDDING) or self.vocab == "overlap" or len(self.rows(name)) == 1
        return fits and self.method_for(name) != "copy"


asked = st.builds(
    Asked,
    models=st.lists(st.sampled_from(MODELS), min_size=1, max_size=3, unique=True),
    template=st.none() | st.sampled_from(("vlm", "tuned", "llm")),
    method=st.sampled_from(["linear", "ties", "dare_linear"]),
    parts=st.none() | st.lists(st.sampled_from(["text", "vision", "projector"]), min_size=1, unique=True),
    exclude=st.lists(st.sampled_from(GLOBS), max_size=2),
    overrides=st.lists(override, max_size=3),
    vocab=st.sampled_from(["template", "overlap"]),
    dtype=st.none() | st.just("float32"),
).filter(Asked.possible)


@settings(max_examples=150, deadline=None)
@given(asked)
def test_every_tensor_has_the_fate_that_the_recipe_asks_for(folders: dict[str, str], asked: Asked) -> None:
    names = {name for name in names_in(folders[asked.first]) if not is_buffer(name)}
    if not any(asked.merges(canonical(name)) for name in names):
        with pytest.raises(Refused, match="nothing would be merged: every tensor of the template would be copied"):
            polymerge.plan(asked.recipe(folders))
        return
    plan = polymerge.plan(asked.recipe(folders))
    check_account(plan, [names_in(entry.path) for entry in plan.inputs])
    assert polymerge.plan(json.loads(json.dumps(plan.to_json()))) == plan
    for step in plan.steps:
        if is_buffer(step.name) or not asked.merges(canonical(step.name)):
            assert (step.fate, step.pieces, step.dtype) == ("copied", (), step.source_dtype), step.name
            continue
        name = step.canonical
        assert (step.fate, name) == ("merged", canonical(step.name))
        assert step.dtype == ("F32" if asked.dtype else step.source_dtype)
        own = shared = step.shape[0]
        if name in (HEAD, EMBEDDING):
            own, shared = ROWS[asked.first], min(asked.rows(name))
        assert [piece.rows for piece in step.pieces] == [((0, shared),), ((shared, own),)][: 1 + (shared < own)]
        assert [piece.setting is None for piece in step.pieces] == [False, True][: 1 + (shared < own)]
        assert plan.settings[step.pieces[0].setting or 0].method == asked.method_for(name)
        reads = reads_of(plan, step.pieces[0])
        inputs = [Path(plan.inputs[place].path).name for place, _ in reads]
        assert inputs == [*asked.models, *(["base"] if asked.method_for(name) != "linear" else [])]
        for model, (_, expr) in zip(inputs, reads, strict=True):
            stored = EMBEDDING if (name, model) == (HEAD, "tied") else name
            assert [canonical(read) for read in names_read(expr)] == [stored]
            assert isinstance(expr, Rows) == (name in (HEAD, EMBEDDING) and ROWS[model] != shared)
