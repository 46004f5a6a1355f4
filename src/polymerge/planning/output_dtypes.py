"""In which dtypes the tensors of a plan are stored, and in which one the output's config.json has them loaded.

The dtype of each tensor is decided before, with its step: the recipe's `dtype` where it is merged and that is said,
else the template's (`planner`, and `adapter_steps` for adapters). Here is what follows from them for the whole output.
A folder is loaded in the one dtype that its config names, whatever its tensors are stored in. So the config has to
name one that holds what was written; and what a template itself has rounded whenever it is loaded, such as the norms of
a bfloat16 checkpoint that are stored as float32, stays as it is.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Final

from polymerge.checkpoints.json_objects import strings_at
from polymerge.dtypes import MERGEABLE, dtype_code, dtype_name, holding, holds
from polymerge.families.config import CONFIG_DTYPES, QUANTIZATION, config_dtype
from polymerge.planning.plan import Step

__all__ = ["Stored", "stored_dtypes"]

_ALONE: Final = " where the model is merged alone (merge_method: linear, weight: 1)"


@dataclass(frozen=True)
class Stored:
    """The dtypes of an output, by their safetensors names; integers are left out.

    tensors  how many tensors are stored in each, in the order of their elements
    loaded   the narrowest dtype that loses nothing of what was written
    needed   the dtypes that it has to hold
    rounded  tensors, by name, that are no part of that: the template's own config rounds them
    asked    whether the recipe asks for a dtype
    mixed    whether there are several of them because this merge writes another dtype than the template's
    merged   whether any of it is merged, so that a dtype that is asked has an effect
    """

    tensors: Mapping[str, int]
    loaded: str | None
    needed: frozenset[str]
    rounded: tuple[str, ...]
    asked: bool
    mixed: bool
    merged: bool = True

    def named(self, code: str) -> str:
        """The dtype that replaces `code` in a config: the same, unless it loses something or another was asked."""
        if self.loaded is not None and (self.asked or not all(holds(code, other) for other in self.needed)):
            return self.loaded
        return code

    def loaded_in(self, config: Mapping[str, Any]) -> str:
        """The dtype that the output is loaded in by default; auto where that is the first tensor's.

        config  the template's
        """
        own = config_dtype(config)
        code = self.loaded if own is None and self.asked else None if own is None else self.named(own)
        return "auto" if code is None else dtype_name(code)

    def written_in(self, text: str) -> str:
        """The text of a config.json with its dtypes, nested ones too, as `named` says; nothing else of it changes.

        A config that says none has its model loaded in the dtype of the first tensor, so a mixture has it said.
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
        """Sentences on mixed dtypes, a config that does not fit its own tensors, a dtype without effect."""
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
            yield f"dtype: it is of what is merged, and nothing is: all keeps its own. It is so{_ALONE}"


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
    """Where a config's text names a dtype (start and stop, in characters), and which one."""
    for (*parts, key), start, stop in strings_at(text):
        if key in CONFIG_DTYPES and QUANTIZATION not in parts:
            code = dtype_code(json.loads(text[start:stop]).removeprefix("torch."))
            if code is not None:
                yield start, stop, code
