"""`polymerge push`: what is uploaded to the hub, what is refused, and what the card says then."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import polymerge
from hub_standin import Standin, empty_cache, sharded
from polymerge.engine import pushing
from polymerge.errors import OutputError, PolymergeError
from running import checkpoint, cli, linear, merged, small_llama

# huggingface_hub hands a file to httpx as `data`
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

CARD = "---\nlicense: {}\n---\n# a model\n"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Standin]:
    """The stand-in, which takes uploads, and an empty cache."""
    with empty_cache(monkeypatch, tmp_path) as server:
        monkeypatch.setenv("HF_TOKEN", "hf_of_the_stand_in")
        server.uploads = tmp_path / "uploads"
        yield server


@pytest.fixture
def output(hub: Standin, tmp_path: Path) -> Path:
    """A merge of a model on the hub and one in a folder, not checked, for its class is none of transformers."""
    remote = sharded(tmp_path / "remote", 1)
    (remote / "README.md").write_text(CARD.format("apache-2.0"))
    hub.publish("a/remote", remote)
    local = checkpoint(tmp_path / "local", small_llama(2))
    (local / "README.md").write_text(CARD.format("cc-by-nc-4.0"))
    return merged(linear("a/remote", local), tmp_path / "out", "--no-verify")


def test_an_output_is_uploaded_private_with_a_complete_card(output: Path, hub: Standin, tmp_path: Path) -> None:
    before = (output / "README.md").read_text()
    assert "its card was not at hand" in before  # that of the hub is not fetched for a merge
    ran = cli("push", output, "me/merge", "--no-verify")
    assert ran.status == 0, ran.err
    place = tmp_path / "uploads" / "me" / "merge"
    here = {file.name: file.read_bytes() for file in output.iterdir() if file.name != "README.md"}
    assert {file.name: file.read_bytes() for file in place.iterdir() if file.name != "README.md"} == here
    assert hub.repositories["me/merge"].private
    assert f"{hub.url}/me/merge: {len(here) + 1} files, private, commit" in ran.out
    assert (output / "README.md").read_text() == before  # the folder is left as it is
    card = (place / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["base_model"] == ["a/remote"]
    assert front["base_model_relation"] == "merge"
    commit = hub.repositories["a/remote"].revisions["main"]
    assert f"- a/remote  # {commit}" in card
    assert f"| a/remote (`a/remote@{commit}`) | template, models[0] |" in card
    assert "| a/remote | apache-2.0 | its text and notices go along" in card
    assert f"| {tmp_path / 'local'} | cc-by-nc-4.0 |" in card
    assert "is for non-commercial use only, and then so is the merge" in card
    assert "merge_method: linear" in card
    assert "note: the card states no licence: say `--license`" in ran.err
    assert "is for non-commercial use only" in ran.err
    assert not hub.stored


def test_it_can_be_merged_again_from_there(output: Path, tmp_path: Path) -> None:
    assert cli("push", output, "me/merge", "--no-verify", "--public", "--license", "cc-by-nc-4.0").status == 0
    found = polymerge.inspect("me/merge")
    assert found.models[0].tensors == 5
    card = (tmp_path / "uploads" / "me" / "merge" / "README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["license"] == "cc-by-nc-4.0"


def test_what_was_measured_is_in_the_card(output: Path, tmp_path: Path) -> None:
    def results(folder: str, source: object, score: float) -> Path:
        task = {"score": score, "total": 40, "samples": {"1": 1.0}}
        said: dict[str, Any] = {"format": "polymerge results", "version": 1, "tool": "polymerge"}
        said |= {"model": {"name": Path(str(source)).name, "source": str(source)}, "tasks": {"maths": task}}
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "results.json").write_text(json.dumps(said))
        return tmp_path / folder

    results("scores", output, 52.5)
    other = results("scores-before", tmp_path / "local", 41.0)
    place = tmp_path / "uploads" / "me" / "merge" / "README.md"
    assert cli("push", output, "me/merge", "--no-verify").status == 0
    assert "| out | maths | 52.50 % | 40 |" in place.read_text()  # of the run beside it, and of no other model
    assert "41.00" not in place.read_text()
    assert cli("push", output, "me/merge", "--no-verify", "--results", other).status == 0
    assert "| local | maths | 41.00 % | 40 |" in place.read_text()


def test_what_was_changed_since_is_refused(output: Path, hub: Standin) -> None:
    (output / "README.md").write_text("my own words")  # which is its owner's to write
    (output / "config.json").write_text('{"model_type": "llama", "more": 1}')
    (output / "extra.txt").write_text("x")
    next(output.glob("*.index.json"), output / "tokenizer.json").unlink()
    ran = cli("push", output, "me/merge", "--no-verify")
    assert ran.status == 2
    for words in ("'config.json' is changed since", "'extra.txt' is new since", " is missing since", "--force"):
        assert words in ran.err, words
    assert "me/merge" not in hub.repositories
    ran = cli("push", output, "me/merge", "--no-verify", "--force", "--json")
    assert ran.status == 0, ran.err
    made = json.loads(ran.out)
    assert made["private"] is True
    assert any("has no place for licences any more" in note for note in made["notes"])


def test_weights_that_were_changed_are_refused(output: Path) -> None:
    file = max(output.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert f"'{file.name}' is changed since it was written" in cli("push", output, "me/merge", "--no-verify").err


def test_a_folder_that_polymerge_did_not_write(tmp_path: Path, hub: Standin) -> None:
    own = checkpoint(tmp_path / "own", small_llama(2))
    for folder, said in ((own, "so polymerge did not write it"), (tmp_path / "gone", "is no folder")):
        ran = cli("push", folder, "me/own")
        assert ran.status == 2
        assert said in ran.err
    assert "no hub repository can have that name" in cli("push", own, "own").err
    assert cli("push", own, "me/own", "--force", "--no-verify").status == 0
    assert (tmp_path / "uploads" / "me" / "own" / "README.md").read_text().startswith("---\ntags:\n- polymerge\n---")
    assert hub.repositories["me/own"].private


def test_one_without_digests_is_of_an_older_version(output: Path) -> None:
    record = json.loads((output / "polymerge.json").read_text())
    assert record["output"].pop("sampled")
    (output / "polymerge.json").write_text(json.dumps(record))
    assert "no digests of the files that were written" in cli("push", output, "me/merge", "--no-verify").err


def test_nothing_private_goes_to_a_public_repository(output: Path, hub: Standin) -> None:
    assert cli("push", output, "me/merge", "--no-verify", "--public").status == 0
    assert not hub.repositories["me/merge"].private
    ran = cli("push", output, "me/merge", "--no-verify")
    assert ran.status == 2
    assert "me/merge: exists and is public. Name another one, or say `--public` if that is meant" in ran.err


def test_what_the_hub_refuses(output: Path, hub: Standin, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.uploads = None
    ran = cli("push", output, "me/merge", "--no-verify")
    assert ran.status == 2
    assert "the hub does not let you write there. Log in with `hf auth login`" in ran.err
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set. Unset it to upload" in cli("push", output, "me/merge", "--no-verify").err


def test_an_output_that_does_not_load_is_not_uploaded(output: Path, hub: Standin) -> None:
    (output / "config.json").write_text('{"model_type": "llama", "hidden_size": 6, "num_hidden_layers": 9}')
    with pytest.raises(OutputError, match="does not pass its check and was not uploaded"):
        polymerge.push(output, "me/merge", force=True)
    assert "me/merge" not in hub.repositories


def test_a_card_keeps_the_words_of_its_owner() -> None:
    card = "---\ntags: [x]\nlicense: mit\n---\nMy words\n"
    assert pushing._with_licence(card, "gpl-3.0") == "---\ntags: [x]\nlicense: gpl-3.0\n---\nMy words\n"
    assert pushing._with_licence("My words", "mit") == "---\nlicense: mit\n---\n\nMy words"
    with pytest.raises(PolymergeError):
        polymerge.push("nowhere", "a/b")
