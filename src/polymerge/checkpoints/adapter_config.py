"""Read adapter_config.json: the scaling of a LoRA adapter's factors, and variants that are not plain LoRA.

PEFT writes one config for many methods. Only plain LoRA is read here: an update of `scaling * B @ A` to a weight that
is the base's own. Any other feature of an adapter is refused by name, before its tensors are misread.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import sqrt
from typing import Annotated, Any, Final, TypeVar

import msgspec

from polymerge.checkpoints.json_objects import checked
from polymerge.checkpoints.patterns import Match, compiled
from polymerge.checkpoints.tensor_info import listed
from polymerge.errors import CheckpointError, Refused, collecting, refuse, shown

__all__ = ["LoraConfig", "foreign_kind", "read_lora_config", "saved_modules"]

T = TypeVar("T")

_AGAIN: Final = "Download it, or save the adapter, again."
_FOLD: Final = "Fold it into its base with PEFT's merge_and_unload(), and merge the result as a full model."
_NO_FOLD: Final = "It cannot be merged; leave it out."
_RESTORE: Final = (
    "Save it again with PEFT's save_pretrained(..., path_initial_model_for_weight_conversion=...), which makes it "
    "plain LoRA for the base as published."
)

_FOREIGN: Final[Mapping[str, tuple[str, str]]] = {
    kind: (why, then)
    for kinds, why, then in (
        (
            "PROMPT_TUNING MULTITASK_PROMPT_TUNING P_TUNING PREFIX_TUNING CPT CARTRIDGE ADAPTION_PROMPT",
            "learns what is put before the input and changes no weight",
            _NO_FOLD,
        ),
        ("XLORA POLY LILY SHADOW", "depends on each input, so there is no one update of a weight", _NO_FOLD),
        ("ADALORA", "has a third factor, lora_E, between lora_A and lora_B, and a rank of its own a module", _FOLD),
        ("VERA PVERA RANDLORA", "scales random projections, which are shared by all modules, by vectors", _FOLD),
        ("VBLORA UNILORA", "builds its factors from a few vectors that all modules share", _FOLD),
        ("LOHA", "is the elementwise product of two low-rank updates", _FOLD),
        ("LOKR", "is a Kronecker product", _FOLD),
        ("IA3 ROAD", "transforms activations, so that its update depends on the base's weights", _FOLD),
        ("OFT BOFT HRA", "is an orthogonal matrix times the base's weights, so that it depends on them", _FOLD),
        ("HIRA GLORA DEFT PEANUT", "is computed from the base's weights, so that its update depends on them", _FOLD),
        ("OSF FROD PSOFT ADAMSS TINYLORA", "is made from a decomposition of the base's weights", _FOLD),
        ("FOURIERFT WAVEFT C3A", "is stored as coefficients of a transform (Fourier, wavelet, circulant)", _FOLD),
        ("SHIRA SUPERTUNING", "changes single entries of the weights", _FOLD),
        ("DELORA", "divides its factors by their norms", _FOLD),
        ("GRALORA MISS", "puts its update together from blocks", _FOLD),
        ("LN_TUNING BEFT TRAINABLE_TOKENS", "trains vectors or rows of the model itself and has no factors", _FOLD),
    )
    for kind in kinds.split()
}
"""By peft_type: why it is not `B @ A`, and what to do."""

_BEYOND: Final[Mapping[str, tuple[str, str]]] = {
    "use_dora": ("rescales each row by a norm that depends on the base's weights (DoRA)", _FOLD),
    "kasa_config": ("cuts off a part of the base's weights and has a third factor (KaSA)", _FOLD),
    "use_bdlora": ("stores its factors as blocks of a diagonal (BD-LoRA)", _FOLD),
    "monteclora_config": ("samples its factors around the stored ones (MonteCLoRA)", _FOLD),
    "layer_replication": ("repeats layers, so that its layers are not those of the base", _FOLD),
    "megatron_config": ("adapts Megatron's parallel layers, which no other model has", _FOLD),
    "enable_lora": ("adapts parts of fused layers with grouped factors, as PEFT no longer does", _FOLD),
    "use_qalora": ("pools the input before lora_A, whose shape is then not the weight's (QA-LoRA)", _NO_FOLD),
    "alora_invocation_tokens": ("acts only after certain tokens, so there is no one update of a weight", _NO_FOLD),
    "arrow_config": ("chooses among adapters for each token, so there is no one update of a weight", _NO_FOLD),
}
"""By key of the config: what it adds to `B @ A` where it is set, and what to do."""

_STARTS: Final = ("gaussian", "eva", "orthogonal", "mica")
"""Values of init_lora_weights that leave the base unchanged, as true and false do."""

_MOVED_STARTS: Final[Mapping[str, tuple[str, str]]] = {
    **dict.fromkeys(
        ("pissa", "olora", "corda", "lora_ga"), ("takes the factors' first product out of the base", _RESTORE)
    ),
    "loftq": (
        "quantizes the base",
        "Fold it into that quantized base with PEFT's merge_and_unload(), and merge the result as a full model.",
    ),
}

_SCALING: Final = (
    "r",
    "lora_alpha",
    "use_rslora",
    "rank_pattern",
    "alpha_pattern",
    "fan_in_fan_out",
    "target_parameters",
)
_WITHOUT_EFFECT: Final = (
    "peft_type", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "peft_version",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save", "bias",
    "lora_bias", "lora_dropout", "init_lora_weights", "loftq_config", "eva_config", "corda_config", "lora_ga_config",
    "velora_config", "megatron_core", "qalora_group_size", "runtime_config", "trainable_token_indices",
    "ensure_weight_tying", "merge_weights", "lora_dtype", "lorap_lr_ratio", "lorap_emb_lr",
)  # fmt: skip
"""Keys that only describe training, or are checked elsewhere (init_lora_weights, trainable_token_indices)."""

_BEFORE: Final = re.compile(r"0\.1[0-8](\.|$)")
"""Versions of PEFT in which the factors of a parameter lie the other way round."""

_LARGE: Final = 1e30  # float32 could not hold much more


_Rank = Annotated[int, msgspec.Meta(gt=0)]
_Alpha = Annotated[float, msgspec.Meta(gt=-_LARGE, lt=_LARGE)]  # NaN is neither
_Indices = list[Annotated[int, msgspec.Meta(ge=0)]]


class _Values(msgspec.Struct):
    """The settings that determine scaling, trained rows and saved modules, as the config spells them."""

    r: _Rank
    lora_alpha: _Alpha
    use_rslora: bool | None = None
    fan_in_fan_out: bool | None = None
    rank_pattern: dict[str, _Rank] | None = None
    alpha_pattern: dict[str, _Alpha] | None = None
    trainable_token_indices: _Indices | dict[str, _Indices] | None = None
    modules_to_save: list[str] | str | None = None
    target_parameters: list[str] | dict[str, str] | bool | None = None
    peft_version: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    bias: str | None = None


@dataclass(frozen=True)
class LoraConfig:
    """How the factors of each module are scaled, and which rows of the embeddings were trained."""

    rank: int
    alpha: float
    rank_stabilized: bool
    """Divide by the root of the rank, not by the rank itself (`use_rslora`)."""
    ranks: tuple[tuple[Match, int], ...]
    """For modules that differ: the first matching pattern applies, in file order, as PEFT loads it."""
    alphas: tuple[tuple[Match, float], ...]
    fan_in_fan_out: bool
    """The adapted weights are stored as [in, out], as in GPT-2."""
    tokens: Mapping[str, tuple[int, ...]]
    """Trained rows by the name of the embedding; "" if the config does not name it."""
    parameters: tuple[str, ...] = ()
    """Ends of the names of parameters that are adapted themselves, without a module of their own."""
    as_stored: bool = False
    """Whether factors of such a parameter of [experts, x, y] are [rank, x] and [y, rank], as up to PEFT 0.18."""

    def parameters_of(self, module: str) -> tuple[str, ...]:
        """The names of the adapted parameters of a module, in the order of the config."""
        names = {end: end.rpartition(".")[2] for end in self.parameters}
        return tuple(dict.fromkeys(name for end, name in names.items() if f".{module}.{name}".endswith(f".{end}")))

    def rank_of(self, module: str) -> int:
        """The rank that the config gives a module."""
        return next((rank for match, rank in self.ranks if match(module)), self.rank)

    def scaling_of(self, module: str, rank: int) -> float:
        """The factor that the product of a module's factors is multiplied by."""
        alpha = next((alpha for match, alpha in self.alphas if match(module)), self.alpha)
        return alpha / (sqrt(rank) if self.rank_stabilized else rank)


def saved_modules(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The modules that were trained as a whole; a single one may be written without a list around it."""
    said = config.get("modules_to_save")
    return (said,) if isinstance(said, str) else tuple(said or ())


def foreign_kind(config: Mapping[str, Any], where: str) -> CheckpointError | None:
    """The error for an adapter of another kind than LoRA, or None; its tensors need not be read then."""
    kind = config.get("peft_type")
    if kind == "LORA":
        return None
    if not isinstance(kind, str):
        said = "is missing" if kind is None else f"is {_shown(kind)}"
        return CheckpointError(f"{where}: peft_type {said}, 'LORA' expected. Save the adapter again with PEFT.")
    why, then = _FOREIGN.get(kind, ("is a kind that this version does not know", _FOLD))
    return CheckpointError(f"{where}: peft_type is '{kind}', only 'LORA' can be read: '{kind}' {why}. {then}")


def read_lora_config(config: Mapping[str, Any], where: str) -> LoraConfig:
    """Check the config of a LoRA adapter; `where` names the file in messages.

    Raises Refused with everything that keeps its update from being `scaling * B @ A` on the base's own weights, and
    with every value that cannot be used.
    """
    with collecting() as found:
        refuse(*_beyond(config, where))
        values = checked(config, _Values, where, then=_AGAIN)
        named = values.target_parameters
        ranks = tuple(_patterns("rank_pattern", values.rank_pattern, where))
        alphas = tuple(_patterns("alpha_pattern", values.alpha_pattern, where))
        tokens = values.trainable_token_indices or {}
        tokens = {"": tokens} if isinstance(tokens, list) else tokens
        if any(len({*indices}) < len(indices) for indices in tokens.values()):
            refuse(CheckpointError(f"{where}: trainable_token_indices: expected different indices. {_AGAIN}"))
        if not found:
            return LoraConfig(
                rank=values.r,
                alpha=values.lora_alpha,
                rank_stabilized=values.use_rslora is True,
                ranks=ranks,
                alphas=alphas,
                fan_in_fan_out=values.fan_in_fan_out is True,
                tokens={module: tuple(indices) for module, indices in tokens.items()},
                parameters=tuple(sorted(named)) if isinstance(named, list) else (),
                as_stored=bool(_BEFORE.match(values.peft_version or "0.18")),
            )
    raise Refused(found)


def _beyond(config: Mapping[str, Any], where: str) -> Iterator[CheckpointError]:
    """Errors for every feature of the config beyond plain LoRA."""
    for key, (why, then) in _BEYOND.items():
        if _is_set(config.get(key)):
            yield CheckpointError(f"{where}: {key} is set to {_shown(config[key])}, which {why}. {then}")
    start = config.get("init_lora_weights", True)
    word = start.lower() if isinstance(start, str) else ""
    moved = next((name for name in _MOVED_STARTS if word.startswith(name)), None)
    if moved:
        why, then = _MOVED_STARTS[moved]
        yield CheckpointError(
            f"{where}: init_lora_weights is '{start}', which {why}: the update belongs to a changed base. {then}"
        )
    elif not (start is None or isinstance(start, bool) or word in _STARTS):
        yield CheckpointError(
            f"{where}: init_lora_weights is {_shown(start)}, not true, false or one of "
            f"{', '.join((*_STARTS, *_MOVED_STARTS))}: it may have changed the base. {_FOLD}"
        )
    known = {*_SCALING, *_WITHOUT_EFFECT, *_BEYOND}
    unknown = [key for key, value in config.items() if key not in known and _is_set(value)]
    if unknown:
        yield CheckpointError(
            f"{where}: sets {listed(unknown)}, which this version does not know and which may change what the factors "
            "mean. Upgrade polymerge, or remove from the file what only says how the adapter was trained."
        )


def _patterns(name: str, by_pattern: Mapping[str, T] | None, where: str) -> Iterator[tuple[Match, T]]:
    """Compile each pattern, with its value; what is none is refused."""
    for pattern, value in (by_pattern or {}).items():
        try:
            yield compiled(pattern, f"{where}: {name}['{shown(pattern)}']"), value
        except CheckpointError as error:
            refuse(error)


def _is_set(value: object) -> bool:
    return value is not None and value is not False and value not in ([], {})


def _shown(value: object) -> str:
    text = repr(value) if not isinstance(value, bool | None) else {True: "true", False: "false", None: "null"}[value]
    return shown(text, 60)
