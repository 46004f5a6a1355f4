"""The scorers alone: what is right, what is refused, and what a tool around them can break."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polymerge.errors import MissingExtraError, PolymergeError, RecipeError, Refused
from polymerge.evaluation.scorers import SCORERS, scorer_named
from polymerge.evaluation.scorers import caption_metrics as metrics
from polymerge.evaluation.scorers.answers import edit_distance, intersection_over_union, parsed_box, parsed_letter
from polymerge.evaluation.scorers.caption_metrics import caption_metrics, meteor, plain_tokens, ptb_lines, ptb_tokens
from polymerge.evaluation.scorers.vqa import punctuation_then_words
from score_files import NEEDS_CAPTIONS, NEEDS_JAVA

ON_CAPTIONS = ("captions", "bleu_1", "bleu_2", "bleu_3", "bleu_4", "meteor", "rouge_l", "cider")
WITH_JAVA = ("captions", "meteor")
ASKED = (["yes", "two dogs"], [["Yes"] * 10, ["2 dogs"] * 4])
PERFECT = {
    "letter": (["A", "B"], ["A", "B"]),
    "box_iou": (["[0,0,1,1]"] * 2, ["0,0,1,1", [0, 0, 1, 1]]),
    "vqa": ASKED,
    "vqa_evalai": ASKED,
    "vqa_official": (ASKED[0], [["yes"] * 10, ["two dogs"] * 4 + ["dogs"] * 6]),
}
SEEN = (
    ["a red bus on a street", "two dogs sleep in the sun"],
    ["A red bus on a street.", ["two dogs sleep in the sun"]],
)


def share(scorer, text, reference):
    (found,) = SCORERS[scorer].score([text], [reference]).samples
    return found


def marks(name):
    return [mark for mark, names in ((NEEDS_CAPTIONS, ON_CAPTIONS), (NEEDS_JAVA, WITH_JAVA)) if name in names]


@pytest.mark.parametrize("name", [pytest.param(name, marks=marks(name)) for name in SCORERS])
def test_every_scorer_knows_a_perfect_answer(name):
    texts = SEEN if name in ON_CAPTIONS else (["yes", "two dogs"], ["yes", ["two dogs", "dogs"]])
    predictions, references = PERFECT.get(name, texts)
    found = SCORERS[name].score(predictions, references)
    best = {"cider": 1000, "captions": (500 + 1000 + 100) / 7}.get(name, 100)
    assert found.score == pytest.approx(best, abs=1e-6)
    assert found.total == 2
    assert found.right == pytest.approx(found.score * 2 / 100)
    assert SCORERS[name].name == name
    assert name in ("bleu_1", "bleu_2", "bleu_3", "bleu_4", "meteor") or len(found.samples) == 2
    worst = SCORERS[name].score(["", ""], references)
    assert worst.score == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("name", SCORERS)
def test_every_scorer_refuses_what_is_not_pairs_of_texts(name):
    score = SCORERS[name].score
    with pytest.raises(RecipeError, match="2 predictions for 1 references"):
        score(["a", "b"], ["a"])
    with pytest.raises(RecipeError, match="no prediction to score"):
        score([], [])
    with pytest.raises(Refused, match="prediction 1: None is a NoneType, not a text"):
        score(["a", None], ["a", "b"])
    with pytest.raises((Refused, MissingExtraError)) as error:
        score(["a", "b", "c"], [{}, "c d e", []])
    if error.type is Refused:
        first, *_, last = error.value.problems
        assert "reference 0: {} " in str(first)
        assert "reference 2: [] " in str(last)


def test_an_unknown_scorer_gets_a_suggestion():
    with pytest.raises(RecipeError, match=r"no scorer 'exakt'\. Did you mean 'exact'\?"):
        scorer_named("exakt")


def test_exact_match_folds_case_only():
    assert share("exact", "Golden Retriever", "golden retriever")
    assert share("exact", "dogs", ["dog", "Dogs"])
    for wrong in ("dog.", " dog", "dog\n", ""):
        assert not share("exact", wrong, "dog")
    assert not share("exact", "", "")
    assert share("exact", "STRASSE", "Straße")
    assert not share("exact_lower", "STRASSE", "Straße")
    assert share("exact_normalised", ' "Two  dogs"! ', "two dogs")
    assert not share("exact_normalised", "?!", "...")


def test_containment_goes_both_ways_but_not_for_nothing():
    assert share("containment", "It is a GOLDFISH.", "goldfish")
    assert share("containment", "fish", "goldfish")
    for nothing in ("", " ", "\n"):
        assert not share("containment", nothing, "golden retriever")
    assert not share("containment", "goldfish", "")


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("A", "A"), ("E. otter", "E"), ("E. ", "E"), ("The answer is F.", "F"), ("So The answer is B, yes", "B"),
        ("E.", None), ("F", None), ("a", None), ("", None), ("The answer is B", None), ("A) otter", None),
        ("The answer is A. The answer is B.", None), ("A. x The answer is B.", "A"),
    ],
)  # fmt: skip
def test_letters(text, letter):
    assert parsed_letter(text) == letter


def test_boxes():
    truth = "[0.1, 0.1, 0.7, 0.7]"
    assert share("box_iou", "The box is 0.1; 0.1; 0.7; 0.40", truth)  # exactly one half, which floats miss
    assert not share("box_iou", "0.1 0.1 0.7 0.39999", truth)
    assert not share("box_iou", "0.1 0.1 0.7 0.7 0.7", truth)
    assert not share("box_iou", "0.7 0.7 0.1 0.1", truth)  # corners the wrong way round
    assert not share("box_iou", "0.3, 0.3, 0.3, 0.3", "0.3, 0.3, 0.3, 0.3")  # nothing covered
    assert share("box_iou", "1e-1 1e-1 7e-1 7e-1", truth)
    with pytest.raises(Refused, match=r"reference 0: '0\.1, 0\.2' is not a box of four numbers"):
        share("box_iou", "0.1 0.1 0.7 0.7", "0.1, 0.2")


@pytest.mark.parametrize("huge", ["1e999999999", "1e-999999999", "9" * 9000, "1e" + "9" * 9000])
def test_no_number_in_a_box_fills_the_memory(huge):
    assert parsed_box(f"{huge}, 0, 1, 1") is None
    assert not share("box_iou", f"{huge}, 0, 1, 1", "0, 0, 1, 1")


corners = st.integers(0, 8)


@given(st.tuples(corners, corners, corners, corners), st.tuples(corners, corners, corners, corners))
def test_overlap_is_the_count_of_cells(one, other):
    def cells(box):
        return {(x, y) for x in range(box[0], box[2]) for y in range(box[1], box[3])}

    if one[0] > one[2] or one[1] > one[3] or other[0] > other[2] or other[1] > other[3]:
        return
    found = intersection_over_union(parsed_box(str(one)), parsed_box(str(other)))
    both, either = cells(one) & cells(other), cells(one) | cells(other)
    assert found == (Fraction(len(both), len(either)) if either else 0)


words = st.text("ab c", max_size=6)


@given(words, words)
def test_edit_distance_is_the_recursive_one(one, other):
    def literal(a, b):
        if not a or not b:
            return len(a) + len(b)
        return min(literal(a[1:], b) + 1, literal(a, b[1:]) + 1, literal(a[1:], b[1:]) + (a[0] != b[0]))

    assert edit_distance(one, other) == literal(one, other)


@pytest.mark.parametrize("name", ["vqa", "vqa_official", "vqa_evalai"])
def test_too_few_annotators_are_refused_and_not_scored_low(name):
    with pytest.raises(Refused, match="reference 1: 1 annotators"):
        SCORERS[name].score(["yes", "yes"], [["yes"] * 4, "yes"])


def test_apostrophes_come_back():
    for bare, whole in (("dont", "don't"), ("couldnt've", "couldn't've"), ("yall'll", "y'all'll"), ("twas", "'twas")):
        assert punctuation_then_words(bare) == whole
    assert punctuation_then_words("shed ill well") == "shed ill well"  # words of their own
    assert punctuation_then_words("none of the ten") == "0 of 10"


def test_plain_tokens():
    assert plain_tokens(["A man's dog doesn't bark, it's 3-D!", "Ein Hund läuft.", "", "..."]) == [
        "a man 's dog does n't bark it 's 3-d",
        "ein hund läuft",
        "",
        "",
    ]


@NEEDS_CAPTIONS
def test_cider_works_without_java_and_says_how(monkeypatch):
    monkeypatch.setenv("PATH", "")
    for name in ON_CAPTIONS:
        if name in WITH_JAVA:
            with pytest.raises(MissingExtraError, match="no `java` on the PATH"):
                SCORERS[name].score(*SEEN)
        else:
            (note,) = SCORERS[name].score(*SEEN).notes
            assert "not the Penn Treebank one" in note
    with pytest.raises(MissingExtraError, match="java"):
        ptb_lines("a text that was not asked for before")


def test_captions_without_the_package_name_the_extra(monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(name, name="pycocoevalcap")

    monkeypatch.setattr(metrics, "import_module", missing)
    with pytest.raises(MissingExtraError, match=r"need pycocoevalcap: pip install 'polymerge\[captions\]'"):
        SCORERS["cider"].score(*SEEN)


def test_references_without_a_word_are_refused():
    with pytest.raises(RecipeError, match="no reference caption has a word"):
        caption_metrics(["a dog"], [["", " "]], ["CIDEr"])


@NEEDS_CAPTIONS
def test_an_empty_caption_is_worth_nothing_beside_an_empty_reference():
    said, truths = ["", "a dog"], [[""], ["a dog"]]
    assert caption_metrics(said, truths, ["ROUGE_L"])["ROUGE_L"].each == (0.0, 1.0)
    assert caption_metrics(said, truths, ["ROUGE_L"], empty_is_wrong=False)["ROUGE_L"].each == (1.0, 1.0)


@NEEDS_CAPTIONS
@NEEDS_JAVA
def test_line_ends_inside_captions_shift_nothing():
    ends = ["\n", "\r", "\r\n", "\v", "\f", "\x1c", "\x85", "\u2028", "\u2029"]
    assert ptb_tokens([f"Two{end}dogs." for end in ends] + ["", "last", ""]) == ["two dogs"] * 9 + ["", "last", ""]


@NEEDS_CAPTIONS
@NEEDS_JAVA
def test_line_ends_do_not_hang_meteor():
    score, each = meteor(["two\ndogs", "a\u2028cat"], [["two dogs"], ["a cat", "one\rcat"]])
    assert score == pytest.approx(1.0)
    assert len(each) == 2


@NEEDS_CAPTIONS
@NEEDS_JAVA
def test_a_meteor_that_ends_is_said_and_started_again():
    meteor(["a first caption"], [["a first caption"]])
    metrics._engine().meteor_p.kill()
    metrics._engine().meteor_p.wait()
    with pytest.raises(PolymergeError, match="METEOR stopped before it had scored 1 captions"):
        meteor(["a second caption"], [["a second caption"]])
    assert meteor(["a third caption"], [["a third caption"]])[0] == pytest.approx(1.0)


@NEEDS_CAPTIONS
def test_a_tokenizer_that_fails_is_said(tmp_path, monkeypatch):
    fake = tmp_path / "java"
    fake.write_text("#!/bin/sh\necho 'no such class' >&2\nexit 3\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    with pytest.raises(PolymergeError, match="tokenizer failed with status 3: no such class"):
        ptb_tokens(["never tokenised before"])
    fake.write_text("#!/bin/sh\necho one\necho two\necho three\n")
    with pytest.raises(PolymergeError, match="made 4 lines of 1 captions"):
        ptb_tokens(["never tokenised before"])
