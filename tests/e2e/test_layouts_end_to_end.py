"""The same merge from and to other files: torch's, several shards, other dtypes; the values are the same."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from layouts import TWICE, Sizes, outside, random_tower, same_bits, text_of, write
from running import checkpoint, linear, merged, raw, small_llama, weights
from tiny import build, generate, load, perturbed, related_llm


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("pair")
    vlm = build("llava_next", folder / "vlm")
    return vlm, related_llm(vlm, folder / "llm", seed=1)


@pytest.fixture(scope="module")
def expected(pair: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return raw(merged(linear(*pair), tmp_path_factory.mktemp("plain") / "out"))


def as_torch(folder: Path, target: Path, shards: int = 1) -> Path:
    """The checkpoint with its weights in torch's own files."""
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns("*.safetensors*"))
    tensors = list(load(folder).items())
    if shards == 1:
        torch.save(dict(tensors), target / "pytorch_model.bin")
        return target
    names = [f"pytorch_model-{number + 1:05}-of-{shards:05}.bin" for number in range(shards)]
    for number, name in enumerate(names):
        torch.save(dict(tensors[number::shards]), target / name)
    weight_map = {name: names[place % shards] for place, (name, _) in enumerate(tensors)}
    (target / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return target


@pytest.mark.parametrize("shards", [1, 3])
def test_torch_files_merge_like_safetensors(
    shards: int, pair: tuple[Path, Path], expected: dict[str, bytes], tmp_path: Path
) -> None:
    vlm, llm = (as_torch(folder, tmp_path / folder.name, shards) for folder in pair)
    assert raw(merged(linear(vlm, llm), tmp_path / "out")) == expected
    assert raw(merged(linear(pair[0], llm), tmp_path / "mixed")) == expected


def test_a_bare_text_tower_whose_family_is_told(
    pair: tuple[Path, Path], expected: dict[str, bytes], tmp_path: Path
) -> None:
    (tmp_path / "alone").mkdir()
    tower = tmp_path / "alone/merged_model_0.9.pth"
    torch.save(load(pair[1]), tower)
    models = [{"model": str(pair[0])}, {"model": str(tower), "family": "llama"}]
    recipe = {"merge_method": "linear", "models": models, "parameters": {"weight": 0.5}}
    assert raw(merged(recipe, tmp_path / "out")) == expected


@pytest.mark.parametrize("template", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("other", ["bfloat16", "float16", "float32"])
def test_mixed_dtypes_are_rounded_once_to_the_template_s(template: str, other: str, tmp_path: Path) -> None:
    one, two = small_llama(1, getattr(torch, template)), small_llama(2, getattr(torch, other))
    recipe = linear(checkpoint(tmp_path / "one", one), checkpoint(tmp_path / "two", two))
    found = load(merged(recipe, tmp_path / "out", "--no-verify"))
    for name in one:
        wanted = (0.5 * one[name].float() + 0.5 * two[name].float()).to(getattr(torch, template))
        assert found[name].dtype == wanted.dtype
        assert torch.equal(found[name], wanted)


def test_a_dtype_that_was_asked_for_holds_for_merged_tensors_alone(pair: tuple[Path, Path], tmp_path: Path) -> None:
    out = merged(linear(*pair, dtype="float32"), tmp_path / "out")
    ours, theirs, found = load(pair[0]), load(pair[1]), load(out)
    for name, tensor in ours.items():
        twin = theirs.get(name.removeprefix("language_model."))
        wanted: Tensor = tensor if twin is None else 0.5 * tensor.float() + 0.5 * twin.float()
        assert found[name].dtype == wanted.dtype, name
        assert torch.equal(found[name], wanted), name
    generate(out, tokens=1)


def test_many_shards_in_and_out(tmp_path: Path) -> None:
    vlm = build("qwen2_vl", tmp_path / "vlm", shard=True)
    tuned = perturbed(vlm, tmp_path / "tuned", seed=3)
    assert len(list(vlm.glob("*.safetensors"))) > 2
    out = merged(linear(vlm, tuned), tmp_path / "out", "--shard-size", "10KB")
    one = merged(linear(vlm, tuned), tmp_path / "one")
    assert [file.name for file in one.glob("*.safetensors*")] == ["model.safetensors"]
    files = sorted(file.name for file in out.glob("*.safetensors"))
    assert files == [f"model-{number + 1:05}-of-{len(files):05}.safetensors" for number in range(len(files))]
    assert len(files) > 5
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert raw(out) == raw(one)
    assert index["weight_map"].keys() == raw(vlm).keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in load(out).values())
    for name, file in index["weight_map"].items():
        assert name.encode() in (out / file).read_bytes()[:4096]
    assert all(file.stat().st_size < 14_000 for file in out.glob("*.safetensors"))  # data, and a header each
    assert torch.equal(generate(out, tokens=1), generate(one, tokens=1))


def test_a_template_with_another_order_of_names_gives_the_same_tensors(
    pair: tuple[Path, Path], expected: dict[str, bytes], tmp_path: Path
) -> None:
    turned = shutil.copytree(pair[0], tmp_path / "turned", ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((turned / "config.json").read_text())
    checkpoint(turned, dict(reversed(load(pair[0]).items())), config)
    assert raw(merged(linear(turned, pair[1]), tmp_path / "out")) == expected


def test_torch_output_loads_as_it_is(pair: tuple[Path, Path], expected: dict[str, bytes], tmp_path: Path) -> None:
    out = merged(linear(*pair), tmp_path / "out", "--format", "torch", "--shard-size", "20KB")
    assert not list(out.glob("*.safetensors*"))
    index = json.loads((out / "pytorch_model.bin.index.json").read_text())["weight_map"]
    assert index.keys() == expected.keys()
    found: dict[str, Tensor] = {}
    for file in out.glob("pytorch_model*.bin"):
        found |= torch.load(file, weights_only=True)
    plain = load(merged(linear(*pair), tmp_path / "plain"))
    assert found.keys() == plain.keys()
    assert all(torch.equal(found[name], plain[name]) for name in found)
    assert torch.equal(generate(out, tokens=1), generate(tmp_path / "plain", tokens=1))


def test_tied_names_of_a_torch_template_share_their_storage_again(tmp_path: Path) -> None:
    vlm = build("qwen2_vl", tmp_path / "vlm", tie=True)
    llm = related_llm(vlm, tmp_path / "llm", seed=1)
    tensors = load(vlm)
    tied = as_torch(vlm, tmp_path / "tied")
    torch.save({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"]}, tied / "pytorch_model.bin")
    out = merged(linear(tied, llm), tmp_path / "out", "--format", "torch")
    found = torch.load(out / "pytorch_model.bin", weights_only=True)
    assert found["lm_head.weight"].data_ptr() == found["model.embed_tokens.weight"].data_ptr()
    plain = merged(linear(tied, llm), tmp_path / "plain")
    assert "lm_head.weight" not in load(plain)
    assert weights(plain) == weights(merged(linear(vlm, llm), tmp_path / "untold"))
    assert torch.equal(generate(out, tokens=1), generate(plain, tokens=1))


@pytest.mark.parametrize("sizes", [Sizes(), Sizes(heads=6, shared=2, width=2)], ids=["heads", "grouped"])
@pytest.mark.parametrize(
    ("template", "source"),
    [("phi3", "llama"), ("internlm2", "llava"), ("molmo", "phi3"), ("llava", "internlm2"), ("cogvlm", "molmo")],
)
def test_fused_language_models_merge_block_by_block(template: str, source: str, sizes: Sizes, tmp_path: Path) -> None:
    towers = [random_tower(sizes, seed, TWICE.get(layout, ())) for seed, layout in ((1, template), (2, source))]
    one, two = (write(name, tmp_path / name, towers[place], sizes) for place, name in enumerate((template, source)))
    models = [{"model": str(folder), "parameters": {"weight": w}} for folder, w in ((one, 0.25), (two, 0.75))]
    recipe = {"merge_method": "linear", "template": str(one), "models": models}
    out = merged(recipe, tmp_path / "out", "--no-verify")
    for name, tensor in text_of(template, out, sizes).items():
        theirs = towers[1][name.partition("@")[0]]
        assert same_bits(tensor, (0.25 * towers[0][name].float() + 0.75 * theirs.float()).to(tensor.dtype)), name
    before, after = load(one), load(out)
    assert before.keys() == after.keys()
    assert all(same_bits(after[name], before[name]) for name in outside(template, before))
