"""The scorers, pure functions on texts and references, in one table."""

from __future__ import annotations

from collections.abc import Mapping

from polymerge.errors import RecipeError, did_you_mean
from polymerge.evaluation.scorers.answers import (
    anls,
    anls_lmms_eval,
    box_iou,
    containment,
    exact,
    exact_lower,
    exact_normalised,
    letter,
)
from polymerge.evaluation.scorers.caption_metrics import captions, corpus_scorer
from polymerge.evaluation.scorers.scored import Scored, Scorer
from polymerge.evaluation.scorers.vqa import vqa, vqa_evalai, vqa_official

__all__ = ["SCORERS", "Scored", "Scorer", "scorer_named"]

_BENCHMARK = "MM-MergeBench, Zeng et al. 2025, arXiv:2502.17159"
_VQA = "Antol et al. 2015, arXiv:1505.00468"
_ANLS = "Biten et al. 2019, arXiv:1905.13648"
_COCO = "Chen et al. 2015, arXiv:1504.00325, by pycocoevalcap"

SCORERS: Mapping[str, Scorer] = {
    row.name: row
    for row in (
        Scorer("exact", "equal to an answer, case ignored", _BENCHMARK, exact),
        Scorer("exact_lower", "equal to an answer in lower case", _BENCHMARK, exact_lower),
        Scorer("exact_normalised", "equal but for case, blanks and outer marks", "polymerge", exact_normalised),
        Scorer("letter", "an option's letter, parsed", "ScienceQA, Lu et al. 2022, arXiv:2209.09513", letter),
        Scorer("containment", "contains an answer or is contained in one", _BENCHMARK, containment),
        Scorer("box_iou", "a box that overlaps the true one by half", _BENCHMARK, box_iou),
        Scorer("vqa", "agreement with annotators, as VQAv2 in lmms-eval", _VQA, vqa),
        Scorer("vqa_official", "agreement with annotators, as the VQA authors' script", _VQA, vqa_official),
        Scorer("vqa_evalai", "agreement with annotators, as EvalAI", _VQA, vqa_evalai),
        Scorer("anls", "closeness by edit distance", _ANLS, anls),
        Scorer("anls_lmms_eval", "closeness by edit distance, as lmms-eval", _ANLS, anls_lmms_eval),
        Scorer("captions", "mean of BLEU-1 to 4, METEOR, ROUGE-L, CIDEr; needs Java", _COCO, captions),
        Scorer("bleu_1", "BLEU-1 of captions", _COCO, corpus_scorer("Bleu_1")),
        Scorer("bleu_2", "BLEU-2 of captions", _COCO, corpus_scorer("Bleu_2")),
        Scorer("bleu_3", "BLEU-3 of captions", _COCO, corpus_scorer("Bleu_3")),
        Scorer("bleu_4", "BLEU-4 of captions", _COCO, corpus_scorer("Bleu_4")),
        Scorer("meteor", "METEOR 1.5 of captions; needs Java", _COCO, corpus_scorer("METEOR")),
        Scorer("rouge_l", "ROUGE-L of captions", _COCO, corpus_scorer("ROUGE_L")),
        Scorer("cider", "CIDEr-D of captions", _COCO, corpus_scorer("CIDEr")),
    )
}


def scorer_named(name: str) -> Scorer:
    """Look up a scorer by its name.

    raises RecipeError, with the nearest name, if there is none.
    """
    if name not in SCORERS:
        raise RecipeError(f"there is no scorer '{name}'.{did_you_mean(name, SCORERS)}")
    return SCORERS[name]
