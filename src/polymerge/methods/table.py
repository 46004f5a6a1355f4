"""The merge methods as data: the properties that recipe and plan use, without importing the functions.

To add a method, write its function and add a row here. The function is called with a block of numbers first, which
it may change in place: `models` [model, n] for `on="weights"`, `deltas` [model, n] for `on="deltas"`; or with `pairs`,
the factors of adapters, for `on="factors"`. The row's parameters follow by name, without those of
`SHARED`; then, by keyword, what the row requires: `cutoff` or `gram` (`statistic`), `width` (`by_row`), `keys` and
`start` (`random`), and `rank` (`needs_rank`). It returns [n]: the merged weights, or the merged delta, which the
executor scales and adds to the base. Blocks are numpy arrays, or, on a GPU, torch tensors: functions composed of the
operations in `methods.kernels` give equal bits in both. `tests/methods/test_table.py` checks rows and functions; the
README's table of methods needs a row, too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from types import MappingProxyType
from typing import Any, Final, Literal

__all__ = [
    "ADAPTERS",
    "METHODS",
    "SHARED",
    "Method",
    "Parameter",
    "method_function",
]

Value = float | bool | str


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

    on           the function's input: the models' weights, their deltas from the base, or the factors of adapters
    source       the paper
    function     module:name of the function, imported only when a merge runs
    parameters   settable in a recipe. `weight` is each model's coefficient: a single model with a weight, a density
                 and a scale of 1 is returned unchanged. `density` is the share of entries that a cutoff or draws keep
    statistic    the statistic that the function needs beyond its block:
                 cutoff and band (exact magnitude thresholds), gram (dot products of whole tensors), overlap (counts
                 of changed entries) or selected (a threshold of variance, and squares)
    span         the scope of a gram: each tensor, or everything merged
    random       whether it draws random numbers, and so needs a key per model
    models       the number of models that it takes, None for any number
    scales       whether the function applies `scale` itself
    additive     whether it is a weighted sum, and so gives the same result in any space
    needs_rank   whether the function takes the rank of the output (methods on factors)
    adds_ranks   whether the output's default rank is the sum of the adapters' ranks; else it is
                 the largest of them (methods on factors)
    equal_ranks  whether it only merges adapters of equal rank
    takes_base   whether a method on weights works on deltas, like those that always do, if the recipe has a base_model
    fewest       the smallest number of models that it takes
    by_row       the flag, and its value, with which it compares row with row: it is then given blocks of whole rows and
                 their `width` instead of a gram
    not_offered  a combination of values that mergekit knows and we do not, and what to do instead
    """

    name: str
    title: str
    source: str
    on: Literal["weights", "deltas", "factors", "nothing"]
    function: str = ""
    parameters: tuple[Parameter, ...] = ()
    statistic: Literal["cutoff", "gram", "band", "overlap", "selected"] | None = None
    span: Literal["tensor", "model"] = "tensor"
    random: bool = False
    models: int | None = None
    scales: bool = False
    additive: bool = False
    needs_rank: bool = False
    adds_ranks: bool = False
    equal_ranks: bool = False
    takes_base: bool = False
    fewest: int = 1
    by_row: tuple[str, bool] | None = None
    not_offered: tuple[Mapping[str, Value], str] | None = None

    def __post_init__(self) -> None:
        if self.statistic == "cutoff" and not self.parameter("density"):
            raise ValueError(f"{self.name}: a cutoff follows from a `density`, and it has no such parameter")
        if self.on != "factors" and (self.needs_rank or self.adds_ranks or self.equal_ranks):
            raise ValueError(f"{self.name}: only methods on factors know of ranks")

    @property
    def copies(self) -> bool:
        """Whether it merges nothing and keeps the template's tensor."""
        return self.on == "nothing"

    @property
    def reads_base(self) -> bool:
        """Whether it works on deltas from a base_model, if the recipe has one."""
        return self.on == "deltas" or self.takes_base

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
        """Whether it also merges adapters: not with dot products of full tensors, nor with a fixed number of models."""
        return self.statistic != "gram" and self.models is None

    def parameter(self, name: str) -> Parameter | None:
        """The parameter of this name, or None."""
        return next((parameter for parameter in self.parameters if parameter.name == name), None)


WEIGHT: Final = Parameter("weight", "number", each=True)
DENSITY: Final = Parameter("density", "number", 1.0, low=0.0, high=1.0, each=True)
GAMMA: Final = Parameter("gamma", "number", 0.01, low=0.0, high=0.49, each=True)
EPSILON: Final = Parameter("epsilon", "number", 1e-5, low=0.0)
SCALE: Final = Parameter("scale", "number", 1.0)
ELECT: Final = Parameter("elect", "choice", "weighted", choices=("weighted", "unweighted"))
AGREE: Final = ("weight", "count", "none")
"""The divisor of the sum in methods that elect signs; each default is mergekit's."""
RESCALE: Final = Parameter("rescale", "flag", True)

SHARED: Final = frozenset({"scale", "trim"})
"""Parameters handled by the executor, not the function: scale multiplies any merged delta, trim sets the scope of
cutoffs.
"""

_ROWS: Final = (
    Method(
        "linear",
        "weighted average of the models",
        "Model soups (Wortsman et al. 2022); `base` of Bring Reason to Vision; interpolation of AdaMMS, equation 1",
        on="weights",
        function="polymerge.methods.sums:linear",
        parameters=(WEIGHT, Parameter("normalize", "flag", True)),
        additive=True,
    ),
    Method(
        "task_arithmetic",
        "base plus a weighted sum of deltas",
        "Editing models with task arithmetic (Ilharco et al. 2023)",
        on="deltas",
        function="polymerge.methods.sums:task_arithmetic",
        parameters=(WEIGHT, Parameter("normalize", "flag", False), SCALE),
        additive=True,
    ),
    Method(
        "ties",
        "trim each delta, elect a sign per entry, join what agrees",
        "TIES-Merging (Yadav et al. 2023), section 3; `ties` of Bring Reason to Vision and AdaMMS",
        on="deltas",
        function="polymerge.methods.ties:ties",
        parameters=(
            WEIGHT,
            DENSITY,
            ELECT,
            Parameter("normalize", "choice", "weight", choices=AGREE),
            Parameter("trim", "choice", "tensor", choices=("tensor", "model")),
            SCALE,
        ),
        statistic="cutoff",
    ),
    Method(
        "dare_linear",
        "drop entries of each delta at random, rescale the rest, sum",
        "DARE (Yu et al. 2024), section 3; `darelinear` of Bring Reason to Vision",
        on="deltas",
        function="polymerge.methods.dare:dare_linear",
        parameters=(WEIGHT, DENSITY, RESCALE, Parameter("normalize", "flag", False), SCALE),
        random=True,
    ),
    Method(
        "dare_ties",
        "drop entries of each delta at random, rescale the rest, elect signs, join what agrees",
        "DARE (Yu et al. 2024) with the election of TIES; `dareties` of Bring Reason to Vision",
        on="deltas",
        function="polymerge.methods.dare:dare_ties",
        parameters=(
            WEIGHT,
            DENSITY,
            RESCALE,
            ELECT,
            Parameter("normalize", "choice", "none", choices=AGREE),
            SCALE,
        ),
        random=True,
    ),
    Method(
        "breadcrumbs",
        "drop the largest and the smallest entries of each delta, sum the rest",
        "Model Breadcrumbs (Davari and Belilovsky 2023)",
        on="deltas",
        function="polymerge.methods.breadcrumbs:breadcrumbs",
        parameters=(
            WEIGHT,
            DENSITY,
            GAMMA,
            Parameter("normalize", "flag", False),
            SCALE,
        ),
        statistic="band",
    ),
    Method(
        "breadcrumbs_ties",
        "drop the largest and the smallest entries of each delta, elect signs, join what agrees",
        "Model Breadcrumbs (Davari and Belilovsky 2023) with the election of TIES",
        on="deltas",
        function="polymerge.methods.breadcrumbs:breadcrumbs_ties",
        parameters=(
            WEIGHT,
            DENSITY,
            GAMMA,
            ELECT,
            Parameter("normalize", "choice", "none", choices=AGREE),
            SCALE,
        ),
        statistic="band",
    ),
    Method(
        "sce",
        "select the entries that vary most, weigh models by their squares, erase minority signs, average",
        "FuseChat (Wan et al. 2024), section 3.3",
        on="deltas",
        function="polymerge.methods.consensus:sce",
        parameters=(Parameter("select_topk", "number", 1.0, low=0.0, high=1.0), SCALE),
        statistic="selected",
    ),
    Method(
        "nearswap",
        "move the base towards one model by at most t per entry",
        "alchemonaut's NearSwap, as in mergekit",
        on="deltas",
        function="polymerge.methods.consensus:nearswap",
        parameters=(Parameter("t", "number", low=0.0), SCALE),
        models=1,
    ),
    Method(
        "ram",
        "average what several models change, take over what only one does",
        "Reinforced Agent Merging (arXiv:2601.13572)",
        on="deltas",
        function="polymerge.methods.consensus:ram",
        parameters=(EPSILON, SCALE),
    ),
    Method(
        "ramplus_tl",
        "average what several models change, enlarge what only one does by how much else of it is shared",
        "Reinforced Agent Merging (arXiv:2601.13572), tensor-local as in mergekit",
        on="deltas",
        function="polymerge.methods.consensus:ramplus_tl",
        parameters=(
            Parameter("r", "number", 0.1),
            Parameter("alpha", "number", 0.2, low=0.0),
            EPSILON,
            SCALE,
        ),
        statistic="overlap",
    ),
    Method(
        "slerp",
        "interpolate two models along the arc between them, tensor by tensor",
        "Animating rotation with quaternion curves (Shoemake 1985), applied to flattened tensors",
        on="weights",
        function="polymerge.methods.directions:slerp",
        parameters=(Parameter("t", "number", low=0.0, high=1.0, between=True),),
        statistic="gram",
        models=2,
    ),
    Method(
        "nuslerp",
        "interpolate two models, or their deltas, along the arc between them, by weights",
        "mergekit's `nuslerp`; Shoemake 1985",
        on="weights",
        function="polymerge.methods.directions:nuslerp",
        parameters=(
            Parameter("weight", "number", low=0.0, each=True),
            Parameter("nuslerp_flatten", "flag", True),
            Parameter("nuslerp_row_wise", "flag", False),
        ),
        statistic="gram",
        models=2,
        takes_base=True,
        by_row=("nuslerp_flatten", False),
        not_offered=(
            {"nuslerp_flatten": False, "nuslerp_row_wise": True},
            "angles between columns are not offered. Leave nuslerp_row_wise out for angles between rows",
        ),
    ),
    Method(
        "multislerp",
        "average the directions of any number of models, or of their deltas, and their norms apart",
        "mergekit's `multislerp`",
        on="weights",
        function="polymerge.methods.directions:multislerp",
        parameters=(
            WEIGHT,
            Parameter("normalize_weights", "flag", True),
            Parameter("eps", "number", 1e-8, low=0.0),
        ),
        statistic="gram",
        takes_base=True,
    ),
    Method(
        "karcher",
        "average the directions of the models on the sphere, and their norms apart",
        "Karcher 1977; mergekit's `karcher`",
        on="weights",
        function="polymerge.methods.directions:karcher",
        parameters=(Parameter("max_iter", "count", 10), Parameter("tol", "number", 1e-5, low=0.0)),
        statistic="gram",
    ),
    Method(
        "model_stock",
        "pull the mean of the models towards their base, the more so the more their deltas differ in direction",
        "Model Stock (Jang et al. 2024), equation 6",
        on="deltas",
        function="polymerge.methods.directions:model_stock",
        parameters=(Parameter("filter_wise", "flag", False), SCALE),
        statistic="gram",
        fewest=2,
        by_row=("filter_wise", True),
    ),
    Method(
        "metagpt",
        "base plus deltas, each weighted by its share of all squared norms",
        "MetaGPT (Zhou et al. 2024); a baseline of AdaMMS",
        on="deltas",
        function="polymerge.methods.sums:metagpt",
        parameters=(SCALE,),
        statistic="gram",
        span="model",
    ),
    Method(
        "robustmerge",
        "prune the factors of each adapter, weigh rank by rank what is left, join",
        "RobustMerge (Zeng et al. 2025), equations 2 to 5",
        on="factors",
        function="polymerge.methods.robustmerge:robustmerge",
        parameters=(
            Parameter("density", "number", 0.2, low=0.0, high=1.0),
            Parameter("scale", "number", 2.0),
            Parameter("floor", "number", 0.8, low=0.0, high=1.0, optional=True),
            Parameter("compose", "choice", "factors", choices=("factors", "product")),
        ),
        scales=True,
        adds_ranks=True,
        equal_ranks=True,
    ),
    Method(
        "cat",
        "weighted sum of the updates, exact: factors side by side, rank the sum of the ranks",
        "PEFT's `cat`",
        on="factors",
        function="polymerge.methods.sums:cat",
        parameters=(WEIGHT, Parameter("normalize", "flag", False), SCALE),
        adds_ranks=True,
    ),
    Method(
        "svd",
        "weighted sum of the updates, cut to a rank by SVD",
        "PEFT's `svd`; Eckart and Young 1936",
        on="factors",
        function="polymerge.methods.sums:svd",
        parameters=(WEIGHT, Parameter("normalize", "flag", False), SCALE),
    ),
    Method(
        "tsv",
        "the largest singular vectors of each adapter, made orthogonal to the others'",
        "TSV-Merge (Gargiulo et al. 2025)",
        on="factors",
        function="polymerge.methods.tsv:tsv",
        parameters=(WEIGHT, SCALE),
        needs_rank=True,
    ),
    Method("copy", "keep the template's tensor", "layer swap of Bring Reason to Vision", on="nothing"),
)

_TABLE: Final = {row.name: row for row in _ROWS}
METHODS: Final[Mapping[str, Method]] = MappingProxyType(_TABLE)
"""Every merge method by name."""

ADAPTERS: Final = (
    Parameter("space", "choice", "delta", choices=("delta", "factors", "knots", "core")),
    Parameter("rank", "count", optional=True),
    Parameter(
        "extra",
        "choice",
        "mean",
        choices=("mean", "released", "first", *(row.name for row in _ROWS if row.entrywise and row.takes_adapters)),
    ),
)
"""Additional parameters of any method when the models are adapters: the space to merge in, the rank of the output,
and the treatment of non-LoRA weights.
"""


def method_function(row: Method) -> Callable[..., Any]:
    """Import and return the function of a row."""
    module, _, name = row.function.partition(":")
    function: Callable[..., Any] = getattr(import_module(module), name)
    return function
