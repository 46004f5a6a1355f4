"""How far answers are from each other in meaning: the cosine distance of sentence embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from polymerge.checkpoints.hub import split_revision
from polymerge.errors import MissingExtraError, RecipeError
from polymerge.tuning.criterion import Distance

__all__ = ["DEFAULT_MODEL", "embedding_distance"]

DEFAULT_MODEL = "sentence-transformers/all-MiniLM-L6-v2"  # AdaMMS's


@cache
def embedding_distance(model: str = DEFAULT_MODEL, device: str = "cpu") -> Distance:
    """A distance of answers: 1 minus the cosine of their embeddings, in [0, 2]; 0 for equal answers.

    AdaMMS (Du et al. 2025), appendix G. Each answer is embedded once, whatever the number of comparisons.

    model  a sentence-transformers model by path or hub id, which may be followed by @revision

    raises MissingExtraError without sentence-transformers, RecipeError where the model cannot be loaded.
    """
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError:
        raise MissingExtraError(
            "--compare embedding needs sentence-transformers: pip install 'polymerge[embeddings]'"
        ) from None
    name, revision = split_revision(model)
    try:
        encoder: Any = SentenceTransformer(name, device=device, revision=revision)
    except (OSError, ValueError, KeyError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise RecipeError(f"--embedding-model {model}: is no sentence-transformers model: {reason}") from None
    known: dict[str, Any] = {}

    def distance(answers: Sequence[str], others: Sequence[str]) -> Sequence[float]:
        new = [text for text in dict.fromkeys((*answers, *others)) if text not in known]
        if new:
            vectors = encoder.encode(new, normalize_embeddings=True, show_progress_bar=False).astype("float64")
            known.update(zip(new, vectors, strict=True))
        return [
            0.0 if one == other else max(0.0, 1.0 - float(known[one] @ known[other]))
            for one, other in zip(answers, others, strict=True)
        ]

    return distance
