"""The merge methods as data: the properties that recipe and plan use, without importing the functions.

To add a method, write its function and add a row here. The function is called with a block of numbers first, which it
may change in place: `models` [model, n] for `on="weights"`, `deltas` [model, n] for `on="deltas"`; or with whole
matrices, `deltas` [model, m, n], for `on="matrices"`; or with `pairs`, the factors of adapters, for `on="factors"`. The
row's parameters follow by name, without those of `SHARED`; then, by keyword, what the row requires: the statistic by
its name (`statistic`), the base's numbers (`sees_base`), `width` (`by_row`), `keys` and `start` (`random`), and `rank`
(`needs_rank`). It returns [n]: the merged weights, or the merged delta, which the executor scales and adds to the base;
of matrices [m, n], which may lie in the memory of `deltas`. Blocks are numpy arrays, or, on a GPU, torch tensors:
functions composed of the operations in `methods.kernels` give equal bits in both. `tests/methods/test_table.py` checks
rows and functions; the README's table of methods and that of docs/methods.md need a row, too.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final

from polymerge.methods.method import Method, Parameter

__all__ = ["ADAPTERS", "METHODS", "MODIFIERS", "SHARED", "out_of_range", "register"]

WEIGHT: Final = Parameter("weight", "number", each=True)
ONE: Final = Parameter("weight", "number", 1.0, each=True)
"""The weight of methods whose papers have none."""
DENSITY: Final = Parameter("density", "number", 1.0, low=0.0, high=1.0, each=True)
GAMMA: Final = Parameter("gamma", "number", 0.01, low=0.0, high=0.49, each=True)
EPSILON: Final = Parameter("epsilon", "number", 1e-5, low=0.0)
SCALE: Final = Parameter("scale", "number", 1.0)
ELECT: Final = Parameter("elect", "choice", "weighted", choices=("weighted", "unweighted"))
AGREE: Final = ("weight", "count", "none")
"""The divisor of the sum in methods that elect signs; each default is mergekit's."""
SPREAD: Final = Parameter("epsilon", "number", 0.15, low=0.0, high=0.5, each=True)
INIT: Final = Parameter("init", "choice", "sum", choices=("sum", "mean", "zero"))
RESCALE: Final = Parameter("rescale", "flag", True)

SHARED: Final = frozenset({"scale", "trim"})
"""Parameters handled by the executor, not the function: scale multiplies any merged delta, trim sets the scope of
cutoffs.
"""


def out_of_range(density: float, epsilon: float) -> str | None:
    """What is wrong with the chances of `della`, which are a density, and as much less and more."""
    if density in (0, 1) or (density - epsilon > 0 and density + epsilon < 1):
        return None
    return (
        f"a density of {density:g} with an epsilon of {epsilon:g} makes chances from {density - epsilon:g} to "
        f"{density + epsilon:g}, which have to lie between 0 and 1. Set a smaller epsilon"
    )


def _della(said: Mapping[str, Any]) -> str | None:
    pairs = zip(said["density"], said["epsilon"], strict=True)
    return next(filter(None, (out_of_range(density, epsilon) for density, epsilon in pairs)), None)


def _isotropic(said: Mapping[str, Any]) -> str | None:
    if said.get("calibrate") != "svc":
        return None
    return "all directions of its delta are equally strong, so none is to be calibrated by itself. Leave calibrate out"


def _nuslerp(said: Mapping[str, Any]) -> str | None:
    if said["nuslerp_flatten"] or not said["nuslerp_row_wise"]:
        return None
    return "angles between columns are not offered. Leave nuslerp_row_wise out for angles between rows"


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
        "della",
        "drop entries at random, small ones rather than large ones, rescale the rest, elect signs, join what agrees",
        "DELLA (Deep et al. 2024), section 3",
        on="deltas",
        function="polymerge.methods.della:della",
        parameters=(
            WEIGHT,
            DENSITY,
            SPREAD,
            RESCALE,
            ELECT,
            Parameter("normalize", "choice", "weight", choices=AGREE),
            SCALE,
        ),
        statistic="rescaling",
        random=True,
        by_row=True,
        refuses=_della,
    ),
    Method(
        "della_linear",
        "drop entries at random, small ones rather than large ones, rescale the rest, sum",
        "DELLA (Deep et al. 2024), section 3, without its election",
        on="deltas",
        function="polymerge.methods.della:della_linear",
        parameters=(WEIGHT, DENSITY, SPREAD, RESCALE, Parameter("normalize", "flag", False), SCALE),
        statistic="rescaling",
        random=True,
        by_row=True,
        refuses=_della,
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
        "arcee_fusion",
        "move the base to one model where that changes most",
        "Arcee Fusion, as in mergekit",
        on="deltas",
        function="polymerge.methods.consensus:arcee_fusion",
        parameters=(SCALE,),
        statistic="importance",
        models=1,
        by_row=True,
        sees_base=True,
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
        refuses=_nuslerp,
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
        only_here=True,
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
        "the largest singular vectors of each delta, made orthogonal to the other models'",
        "TSV-Merge (Gargiulo et al. 2025)",
        on="matrices",
        function="polymerge.methods.tsv:tsv_of_deltas",
        of_factors="polymerge.methods.tsv:tsv",
        parameters=(ONE, Parameter("share", "number", low=0.0, high=1.0, optional=True), SCALE),
        needs_rank=True,
        takes_tensors=True,
        decomposes=(1, 2),
        holds=(0.0, 3.4),
    ),
    Method(
        "iso_c",
        "the sum of the deltas, with all of its directions made equally strong",
        "Isotropic merging (Marczak et al. 2025), section 4.1",
        on="matrices",
        function="polymerge.methods.isotropic:iso_c",
        parameters=(SCALE,),
        adds_ranks=True,
        takes_tensors=True,
        decomposes=(0, 1),
        holds=(0.0, 2.3),
        refuses=_isotropic,
    ),
    Method(
        "iso_cts",
        "what the deltas have in common and what is each one's own, all directions equally strong",
        "Isotropic merging (Marczak et al. 2025), section 4.2",
        on="matrices",
        function="polymerge.methods.isotropic:iso_cts",
        parameters=(Parameter("common_space_fraction", "number", 0.8, low=0.0, high=1.0), SCALE),
        adds_ranks=True,
        takes_tensors=True,
        decomposes=(1, 3),
        holds=(1.0, 4.2),
        refuses=_isotropic,
    ),
    Method(
        "optmerge",
        "go from the mean of the deltas towards what interferes least with the largest components of each",
        "OptMerge (ICLR 2026), in closed form",
        on="matrices",
        function="polymerge.methods.wudi:optmerge",
        parameters=(SCALE,),
        takes_ranks=True,
        adds_ranks=True,
        takes_tensors=True,
        decomposes=(1, 1),
        holds=(1.0, 3.5),
    ),
    Method(
        "swudi",
        "go from the sum of the deltas towards what interferes least with each, along the main directions",
        "SWUDI (2026), by the authors of OptMerge",
        on="matrices",
        function="polymerge.methods.wudi:swudi",
        parameters=(INIT, Parameter("share", "number", 0.65, low=0.0, high=1.0), SCALE),
        adds_ranks=True,
        decomposes=(0, 1),
        holds=(0.0, 4.3),
        decomposes_inputs=True,
        holds_below=2.6,
    ),
    Method(
        "aswudi",
        "like swudi, along as many directions as the spectrum tells",
        "ASWUDI (2026), by the authors of OptMerge",
        on="matrices",
        function="polymerge.methods.wudi:aswudi",
        parameters=(
            INIT,
            Parameter("rank_rule", "choice", "participation_sqrt", choices=("participation_sqrt", "gavish_donoho")),
            SCALE,
        ),
        adds_ranks=True,
        decomposes=(0, 1),
        holds=(0.0, 4.3),
        decomposes_inputs=True,
        holds_below=2.6,
    ),
    Method(
        "dc_merge",
        "each delta's largest components between common bases, where few entries stay and signs are elected",
        "DC-Merge (CVPR 2026)",
        on="matrices",
        function="polymerge.methods.dc_merge:dc_merge",
        parameters=(
            Parameter("keep", "number", 0.001, low=0.0, high=1.0),
            Parameter("smoothing", "choice", choices=("none", "avg", "linear"), optional=True),
            Parameter("rho", "number", 5.0, low=1.0),
            SCALE,
        ),
        takes_ranks=True,
        adds_ranks=True,
        decomposes=(1, 2),
        holds=(0.0, 5.2),
    ),
    Method(
        "ip_merge",
        "the first model's delta, and of the others' what lies along its directions",
        "IP-Merging (arXiv:2510.14387)",
        on="matrices",
        function="polymerge.methods.ip_merge:ip_merge",
        parameters=(
            ONE,
            Parameter("rank", "count", 1024),
            Parameter("threshold", "number", 0.4, low=0.0, high=1.0),
            SCALE,
        ),
        fewest=2,
        rest="first",
        decomposes=(1, 0),
        holds=(0.0, 4.2),
    ),
    Method("copy", "keep the template's tensor", "layer swap of Bring Reason to Vision", on="nothing"),
)

_TABLE: Final = {row.name: row for row in _ROWS}
METHODS: Final[Mapping[str, Method]] = MappingProxyType(_TABLE)
"""Every merge method by name; those of the user's own as well, once they are registered."""


def register(name: str, row: Method | None) -> None:
    """Add a method of the user's own to `METHODS`, which `polymerge.methods.own` has checked; None takes one away."""
    if row is None:
        del _TABLE[name]
    else:
        _TABLE[name] = row


MODIFIERS: Final = (
    Parameter("calibrate", "choice", choices=("svc",), optional=True),
    Parameter("alpha", "number", 1.0, low=1e-6),
)
"""Additional parameters of any method on deltas whose recipe says `calibrate`: what is done to each merged matrix, and
its parameter. A method's own parameter of the same name stays the method's.
"""

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
