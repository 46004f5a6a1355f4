"""What cards state of licences, and which of the well-known ones do not go together."""

from __future__ import annotations

import pytest

from polymerge.engine.licences import TERMS, Stated, card_metadata, conflicts, licence_lines, stated_in


def together(**licences: str) -> list[str]:
    return list(dict.fromkeys(conflicts([Stated(model, name) for model, name in licences.items()])))


@pytest.mark.parametrize(
    ("card", "said"),
    [
        ("---\nlicense: apache-2.0\n---\ntext", Stated("m", "apache-2.0")),
        ("---\nlicense: Apache-2.0\ntags: [x]\n---\n", Stated("m", "apache-2.0")),
        ("---\nlicense: other\nlicense_name: qwen\nlicense_link: https://x.y/z\n---\n", Stated("m", "qwen", "https://x.y/z")),
        ("---\nlicense: [mit, apache-2.0]\n---\n", Stated("m", "mit, apache-2.0")),
        ("---\ntags: [x]\n---\n", Stated("m", None)),
        ("# no metadata", Stated("m", None)),
        ("---\nlicense: [\n---\n", Stated("m", None)),
        ("---\njust text\n---\n", Stated("m", None)),
        ("---\nlicense: mit", Stated("m", None)),
        ("", Stated("m", None)),
        (None, Stated("m", None, seen=False)),
        ("---\nlicense: \"a\\u001b[31mb\"\n---\n", Stated("m", "a\\x1b[31mb")),
    ],
)  # fmt: skip
def test_what_a_card_states(card: str | None, said: Stated) -> None:
    assert stated_in("m", card) == said


def test_metadata_of_a_card_is_a_mapping() -> None:
    assert card_metadata("---\n- a\n---\n") == {}
    assert card_metadata("---\n!!python/object:os.system {}\n---\n") == {}


def test_the_same_licence_goes_with_itself() -> None:
    for name, terms in TERMS.items():
        if not terms.closed:
            assert together(a=name, b=name) == [], name


def test_free_ones_go_together() -> None:
    assert together(a="apache-2.0", b="mit", c="bsd-3-clause", d="cc-by-4.0", e="cc0-1.0") == []
    assert together(a="apache-2.0", b="llama3.1") == []
    assert together(a="gpl-3.0", b="mit") == []
    assert together(a="cc-by-sa-4.0", b="gpl-3.0") == []  # the one may be passed on under the other


@pytest.mark.parametrize(
    ("one", "other", "said"),
    [
        ("cc-by-nc-4.0", "apache-2.0", "a (cc-by-nc-4.0) is for non-commercial use only, and then so is the merge."),
        ("cc-by-nd-4.0", "mit", "a (cc-by-nd-4.0) may not be shared in changed form"),
        ("cc-by-sa-4.0", "cc-by-nc-sa-4.0", "each want their own licence"),
        ("gpl-3.0", "llama3.1", "a (gpl-3.0) allows no further limits on what is derived, and b (llama3.1) has some"),
        ("gpl-3.0", "cc-by-nc-4.0", "a (gpl-3.0) allows no further limits"),
        ("llama3", "apache-2.0", "a (llama3) may improve no language model but Llama 3, and b is under apache-2.0"),
        ("llama2", "llama3", "a (llama2) may improve no language model but Llama 2"),
    ],
)
def test_those_that_do_not(one: str, other: str, said: str) -> None:
    assert any(said in line for line in together(a=one, b=other))
    swapped = [line.replace("b (", "A (").replace("a (", "b (") for line in together(b=one, a=other)]
    assert len(swapped) == len(together(a=one, b=other))


def test_unknown_ones_are_listed_as_such_and_judged_by_nobody() -> None:
    stated = [Stated("a/x", "mit"), Stated("b/y", "tongyi-qianwen", "https://b/y"), Stated("c", None),
              Stated("d", None, seen=False)]  # fmt: skip
    lines = licence_lines(stated)
    assert "| a/x | mit | its copyright notice goes along |" in lines
    assert "| b/y | tongyi-qianwen ([text](https://b/y)) | not one that polymerge knows: read it |" in lines
    assert "| c | its card states none | ask its authors |" in lines
    assert "| d | its card was not at hand | look it up |" in lines
    assert not any("do not simply" in line for line in lines)
    assert lines[-1].endswith("no legal advice.")
    assert any("do not simply" in line for line in licence_lines([Stated("a", "gpl-3.0"), Stated("b", "gemma")]))


def test_a_card_cannot_break_the_table() -> None:
    found = stated_in("m", '---\nlicense: "a | b"\nlicense_link: "javascript:alert(1)"\n---\n')
    assert "| m | a / b | not one that polymerge knows: read it |" in licence_lines([found])
