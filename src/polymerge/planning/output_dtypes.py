"""The storage dtypes of an output, and the dtype that its config.json names for loading.

The dtype of each tensor is decided before, with its step: the recipe's `dtype` where the tensor is merged, else the
template's (`planner`, and `adapter_steps` for adapters). Here is what follows for the whole output. A folder is loaded
in the single dtype that its config names, whatever its tensors are stored in. So the config must name one that holds
what was written; but tensors that the template's own config rounds on loading, such as the norms of a bfloat16
checkpoint that are stored as float32, stay as they are.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Final

from polymerge.checkpoints import Checkpoint
from polymerge.checkpoints.json_objects import strings_at
from polymerge.dtypes import MERGEABLE, dtype_code, dtype_name, holding, holds
from polymerge.families import untied, with_rows
from polymerge.families.config import CONFIG_DTYPES, QUANTIZATION, config_dtype
from polymerge.families.quantization import quantization_method, without_quantization
from polymerge.planning.model import EMBEDDING, HEAD
from polymerge.planning.plan import Plan, Step

__all__ = ["Stored", "output_config", "stored_dtypes"]

_ALONE: Final = " where the model is merged alone (merge_method: linear, weight: 1)"


@dataclass(frozen=True)
class Stored:
    """The dtypes of an output, by their safetensors names; integers are excluded.

    tensors  the number of tensors stored in each, ordered by number of elements
    loaded   the narrowest dtype that loses nothing of what was written
    needed   the dtypes that `loaded` has to hold
    rounded  names of the tensors excluded from that: the template's own config rounds them
    asked    whether the recipe sets a dtype
    mixed    whether there are several dtypes because this merge writes one that differs from the template's
    merged   whether any tensor is merged, so that setting a dtype has an effect
    """

    tensors: Mapping[str, int]
    loaded: str | None
    needed: frozenset[str]
    rounded: tuple[str, ...]
    asked: bool
    mixed: bool
    merged: bool = True

    def named(self, code: str) -> str:
        """The dtype that replaces `code` in a config: the same unless it loses precision or the recipe sets another."""
        if self.loaded is not None and (self.asked or not all(holds(code, other) for other in self.needed)):
            return self.loaded
        return code

    def loaded_in(self, config: Mapping[str, Any]) -> str:
        """The dtype that the output is loaded in by default; auto if that is the first tensor's.

        config  the template's
        """
        own = config_dtype(config)
        code = self.loaded if own is None and self.asked else None if own is None else self.named(own)
        return "auto" if code is None else dtype_name(code)

    def written_in(self, text: str) -> str:
        """Rewrite the dtypes in the text of a config.json, nested ones too, with `named`; all else is unchanged.

        A model whose config names no dtype is loaded in the dtype of its first tensor; mixed dtypes are thus stated.
        """
        made, end = [], 0
        if self.mixed and self.loaded is not None and not any(key in json.loads(text) for key in CONFIG_DTYPES):
            opening = re.match(r"\s*\{(\s*)", text)
            assert opening is not None
            # the key that every version of transformers reads
            made, end = [f'{opening[0]}"torch_dtype": "{dtype_name(self.loaded)}",{opening[1]}'], opening.end()
        for start, stop, code in _dtypes_in(text):
            if self.named(code) != code:
                made += [text[end:start], json.dumps(dtype_name(self.named(code)))]
                end = stop
        return "".join([*made, text[end:]])

    def warnings(self, config: Mapping[str, Any], template: str) -> Iterator[str]:
        """Sentences on mixed dtypes, a config that contradicts its tensors, a dtype without effect."""
        own = config_dtype(config)
        if self.mixed and self.loaded is not None:
            held = " and ".join(f"{dtype_name(code)} ({count})" for code, count in self.tensors.items())
            yield (
                f"dtype: the output's tensors are of {held}, since what is copied keeps its dtype; config.json says "
                f"{dtype_name(self.loaded if own is None else self.named(own))}, in which nothing of them is lost"
            )
        elif own is not None and not self.asked and self.named(own) != own:
            named = dtype_name(self.named(own))
            rounded = " and ".join(
                dtype_name(code) for code in self.tensors if code in self.needed and not holds(own, code)
            )
            yield (
                f"'{template}': its config.json says {dtype_name(own)}, which rounds its tensors of {rounded}; the "
                f"output's says {named}, in which nothing of them is lost. `dtype: {dtype_name(own)}` stores them so"
                f"{'' if self.merged else _ALONE}"
            )
        if self.asked and not self.merged:
            yield f"dtype: it applies to merged tensors, and none is merged: all keep theirs. It has an effect{_ALONE}"


def stored_dtypes(steps: Sequence[Step], config: Mapping[str, Any], asked: bool) -> Stored:
    """The dtypes of an output.

    config  the template's
    asked   whether the recipe asks for a dtype
    """
    floats = [step for step in steps if step.dtype in MERGEABLE and step.fate != "tied"]
    before, after = Counter[str](), Counter[str]()
    for step in floats:
        before[step.source_dtype] += prod(step.shape)
        after[step.dtype] += prod(step.shape)
    most = {counts.most_common(1)[0][0] for counts in (before, after) if counts}
    own = config_dtype(config)
    rounded = tuple(
        step.name
        for step in floats
        if step.dtype == step.source_dtype and step.dtype not in most and own and not holds(own, step.dtype)
    )
    left = set(rounded)
    needed = frozenset(step.dtype for step in floats if step.name not in left)
    tensors = Counter(step.dtype for step in floats)
    return Stored(
        tensors={code: tensors[code] for code, _ in after.most_common()},
        loaded=holding(needed) if needed else None,
        needed=needed,
        rounded=rounded,
        asked=asked,
        mixed=len(needed) > 1 and any(step.dtype != step.source_dtype for step in floats),
        merged=any(step.fate == "merged" for step in steps),
    )


def _dtypes_in(text: str) -> Iterator[tuple[int, int, str]]:
    """The spans (start and stop, in characters) at which a config's text names a dtype, and the dtype."""
    for (*parts, key), start, stop in strings_at(text):
        if key in CONFIG_DTYPES and QUANTIZATION not in parts:
            code = dtype_code(json.loads(text[start:stop]).removeprefix("torch."))
            if code is not None:
                yield start, stop, code


def output_config(plan: Plan, template: Checkpoint) -> Mapping[str, Any]:
    """The template's config adapted to the output: vocabulary size, untied head, plain weights; but for dtypes."""
    config = untied(template.config) if plan.unties else template.config
    if quantization_method(config) is not None:  # the plan has found that the weights are not
        config = without_quantization(config)
    for step in plan.steps:
        stored = template.entries.get(step.name)
        if step.canonical in (EMBEDDING, HEAD) and stored is not None and stored.shape != step.shape:
            return with_rows(config, stored.shape[0], step.shape[0])
    return config
