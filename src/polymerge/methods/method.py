"""The row of a merge method: what recipe, plan and executor ask of it, so that no code tests for its name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Final, Literal, get_args

__all__ = ["READS", "Method", "Parameter", "keywords_of", "method_function"]

Value = float | bool | str
On = Literal["weights", "deltas", "matrices", "factors", "nothing"]

READS: Final[Mapping[str, tuple[str, ...]]] = {
    "cutoff": ("density",),
    "gram": (),
    "band": ("density", "gamma"),
    "overlap": ("epsilon",),
    "selected": ("select_topk",),
    "rescaling": ("density", "epsilon", "rescale", "keys", "width"),
    "importance": ("width",),
}
"""The statistics that a row can ask for, and what each follows from beside the numbers: parameters of the row, and what
else its function is given.
"""


@dataclass(frozen=True)
class Parameter:
    """A parameter that a recipe can set for a method.

    kind      number, count (a whole number from 1), flag (true or false) or choice
    default   None if the recipe must set it, or if an optional parameter has no default
    low, high the closed range of a number
    choices   the accepted words of a choice
    each      one value per model (a recipe may set it per model), else one for the merge
    optional  whether it may be omitted or null, with a meaning of its own
    between   a position from 0 to 1 between two models: counted from base_model if that is one of them, and the second
              one's share if the recipe sets weights instead
    """

    name: str
    kind: Literal["number", "count", "flag", "choice"]
    default: Value | None = None
    low: float = float("-inf")
    high: float = float("inf")
    choices: tuple[str, ...] = ()
    each: bool = False
    optional: bool = False
    between: bool = False


@dataclass(frozen=True)
class Method:
    """One row of the table: all properties of a method, so that no code tests for its name.

    on           the function's input: the models' weights, their deltas from the base, whole matrices of deltas, or the
                 factors of adapters
    source       the paper
    function     module:name of the function, imported only when a merge runs; of one's own method, the function
    of_factors   module:name of the form that a method on matrices has for the factors of adapters, or the function;
                 without one, its function is given their cores
    parameters   settable in a recipe. `weight` is each model's coefficient: a single model with a weight, a density
                 and a scale of 1 is returned unchanged. `density` is the share of entries that a cutoff or draws keep
    statistic    the statistic that the function needs beyond its block, one of `READS`:
                 cutoff and band (exact magnitude thresholds), gram (dot products of whole tensors), overlap (counts
                 of changed entries), selected (a threshold of variance, and squares), rescaling (L1 norms of what
                 draws keep) or importance (a threshold)
    span         the scope of a gram: each tensor, or everything merged
    random       whether it draws random numbers, and so needs a key per model
    models       the number of models that it takes, None for any number
    scales       whether the function applies `scale` itself
    additive     whether it is a weighted sum, and so gives the same result in any space
    needs_rank   whether the function of factors takes the rank of the output
    takes_ranks  whether a function of matrices takes the adapters' own ranks where it is given their cores
    adds_ranks   whether the default rank of a merged adapter is the sum of the adapters' ranks; else it is
                 the largest of them (methods on factors, or on matrices)
    equal_ranks  whether it only merges adapters of equal rank
    takes_base   whether a method on weights works on deltas, like those that always do, if the recipe has a base_model
    fewest       the smallest number of models that it takes
    by_row       whether it compares row with row, or the flag and its value with which it does: it is then given blocks
                 of whole rows and their `width`, and no gram
    sees_base    whether the function takes the base's numbers
    takes_tensors  whether a function of matrices takes torch tensors, too; else what lies on a GPU is brought to the
                 host for it
    decomposes   how many decompositions of a matrix a method on matrices takes: for each model, and beside them
    holds        what is in memory beside the deltas where it matters most: matrices of their size, and squares of the
                 decomposed side, in float64
    decomposes_inputs  whether these are of the inputs' side, [n, n], where others are of the smaller one
    holds_below  the squares where the models' rows below each other are the decomposed side
    rest         what a method on matrices takes of a tensor that is none: the mean of the deltas, or the first model's
    refuses      returns what is wrong with values that are each in range, and what to do instead, or None
    only_here    whether mergekit has no such method, so that no recipe can have parameters that it ignores
    """

    name: str
    title: str
    source: str
    on: On
    function: str | Callable[..., Any] = ""
    of_factors: str | Callable[..., Any] = ""
    parameters: tuple[Parameter, ...] = ()
    statistic: str | None = None
    span: Literal["tensor", "model"] = "tensor"
    random: bool = False
    models: int | None = None
    scales: bool = False
    additive: bool = False
    needs_rank: bool = False
    takes_ranks: bool = False
    adds_ranks: bool = False
    equal_ranks: bool = False
    takes_base: bool = False
    fewest: int = 1
    by_row: tuple[str, bool] | bool = False
    sees_base: bool = False
    takes_tensors: bool = False
    decomposes: tuple[int, int] = (0, 0)
    holds: tuple[float, float] = (1.0, 6.0)
    decomposes_inputs: bool = False
    holds_below: float = 0.0
    rest: Literal["mean", "first"] = "mean"
    refuses: Callable[[Mapping[str, Any]], str | None] | None = None
    only_here: bool = False

    def __post_init__(self) -> None:
        for name, words in (("on", get_args(On)), ("statistic", (None, *READS)), ("span", ("tensor", "model"))):
            if (value := getattr(self, name)) not in words:
                raise ValueError(f"{self.name}: {name} cannot be '{value}', only {', '.join(map(str, words))}")
        known = {*(parameter.name for parameter in self.parameters), *keywords_of(self)}
        for name in READS.get(self.statistic or "", ()):
            if name not in known:
                raise ValueError(f"{self.name}: {self.statistic} follows from `{name}`, and it has no such parameter")
        if self.statistic == "importance" and self.on != "deltas":
            raise ValueError(f"{self.name}: only deltas have an importance")
        if self.sees_base and (self.on != "deltas" or self.models is None):
            raise ValueError(f"{self.name}: only methods on the deltas of a number of checkpoints see their base")
        whole, of_factors = self.on == "matrices", self.on == "factors" or self.of_factors
        if (self.needs_rank or self.equal_ranks) and not of_factors:
            raise ValueError(f"{self.name}: only methods on factors know of ranks")
        if self.scales and not of_factors:
            raise ValueError(f"{self.name}: only methods on factors apply `scale` themselves")
        if self.adds_ranks and not (whole or of_factors):
            raise ValueError(f"{self.name}: only methods on factors or matrices add ranks")
        if not whole and (self.of_factors or self.takes_ranks or self.takes_tensors or self.decomposes != (0, 0)):
            raise ValueError(f"{self.name}: says of itself what only methods on matrices have")
        if whole and (self.statistic or self.random or self.by_row):
            raise ValueError(f"{self.name}: a function of whole matrices needs nothing beside them")

    @property
    def copies(self) -> bool:
        """Whether it merges nothing and keeps the template's tensor."""
        return self.on == "nothing"

    @property
    def needs_base(self) -> bool:
        """Whether it works on deltas from a base_model, which a recipe for checkpoints then has to have."""
        return self.on in ("deltas", "matrices")

    @property
    def reads_base(self) -> bool:
        """Whether it works on deltas from a base_model, if the recipe has one."""
        return self.needs_base or self.takes_base

    @property
    def entrywise(self) -> bool:
        """Whether it works on blocks of any numbers: weights, or coordinates of adapters."""
        return self.on in ("weights", "deltas")

    @property
    def interpolates(self) -> bool:
        """Whether it has a parameter that is a position between two models."""
        return any(parameter.between for parameter in self.parameters)

    @property
    def takes_adapters(self) -> bool:
        """Whether it also merges adapters: not with dot products of full tensors, a fixed number of models, or a `rank`
        of its own, which is that of the output.
        """
        return self.statistic != "gram" and self.models is None and self.parameter("rank") is None

    def parameter(self, name: str) -> Parameter | None:
        """The parameter of this name, or None."""
        return next((parameter for parameter in self.parameters if parameter.name == name), None)


def keywords_of(row: Method, *, of_factors: bool = False) -> list[str]:
    """What a row's function, or its form for factors, is given by keyword beside parameters, in its order."""
    asked: list[str | None] = [row.statistic]
    asked += ["base"] if row.sees_base else []
    asked += ["width"] if row.by_row else []
    asked += ["keys", "start"] if row.random else []
    asked += ["rank"] if row.needs_rank and (of_factors or row.on == "factors") else []
    asked += ["ranks"] if row.takes_ranks and not of_factors else []
    return [name for name in asked if name is not None]


def method_function(row: Method, *, of_factors: bool = False) -> Callable[..., Any]:
    """Import and return the function of a row; of one on matrices, perhaps the form that it has for factors."""
    named = row.of_factors if of_factors else row.function
    if not isinstance(named, str):
        return named
    module, _, name = named.partition(":")
    function: Callable[..., Any] = getattr(import_module(module), name)
    return function
