"""Ask a batch, and where something in it fails, find out what, so that one bad sample costs no other its answer."""

from __future__ import annotations

from collections.abc import Sequence

from polymerge.inference.answering import Answerer, AnswerError
from polymerge.inference.prompt import Prompt

__all__ = ["Attempt", "attempted"]

Attempt = tuple[str | None, str]
"""An answer and nothing, or None and why there is none."""


def attempted(answerer: Answerer, batch: Sequence[Prompt]) -> list[Attempt]:
    """What came of each prompt of a batch, in its order.

    Where images are broken the others are asked together without them; where the model fails each is asked alone.
    What is asked together depends on the batch only, so that the answers do, too.
    """
    try:
        return [(answer, "") for answer in answerer.answer(batch)]
    except AnswerError as error:
        if len(batch) == 1:
            return [(None, str(error))]
        broken = set(error.ids)
    whole = [prompt for prompt in batch if prompt.id not in broken]
    found = dict(zip((prompt.id for prompt in whole), attempted(answerer, whole), strict=True)) if whole else {}
    return [found[prompt.id] if prompt.id in found else attempted(answerer, [prompt])[0] for prompt in batch]
