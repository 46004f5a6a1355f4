"""Adapters that PEFT trained on tiny models of every family, folded, and what the model says before and after."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

import polymerge
from polymerge.inference.live import LiveModel
from running import raw
from tiny import loaded, logits

SAME_LOGITS = {"rtol": 1e-4, "atol": 2e-5}
"""Of float32 models whose weights agree to `SAME_WEIGHTS`: the factors are applied one by one here, summed up there."""


SAME_WEIGHTS = {"rtol": 1e-6, "atol": 1e-6}
"""Between two float32 sums over the rank in different orders, of numbers below 10."""


@dataclass
class Trained:
    """A base with an adapter, and what PEFT has to say of the two.

    before, after  every parameter of the base, and of PEFT's `merge_and_unload`
    base_says, says  logits without and with the adapter
    """

    base: Path
    adapter: Path
    before: dict[str, Tensor]
    after: dict[str, Tensor]
    base_says: Tensor
    says: Tensor


def learned(base: Path, adapter: Path, seed: int = 7, size: float = 0.15, **settings: Any) -> Any:
    """Put an adapter on `base`, change every trainable parameter as training would, and save it; PEFT's model."""
    given = {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "v_proj", "down_proj"]} | settings
    with torch.random.fork_rng():
        model = loaded(base)
        torch.manual_seed(seed)  # peft draws what a factor begins with
        peft = get_peft_model(model, LoraConfig(**given)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in sorted(peft.named_parameters()):
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=size)
    peft.save_pretrained(adapter)
    return peft


def trained(base: Path, adapter: Path, **settings: Any) -> Trained:
    """Train an adapter (`learned`), and hear what PEFT has to say of it."""
    model = loaded(base)
    before, base_says = {name: tensor.clone() for name, tensor in model.state_dict().items()}, logits(model, base)
    peft = learned(base, adapter, **settings)
    says = logits(peft, base)
    after = {name: tensor.clone() for name, tensor in peft.merge_and_unload().state_dict().items()}
    assert (says - base_says).abs().max() > 0.01
    return Trained(base, adapter, before, after, base_says, says)


def check(case: Trained, out: Path, *, exact: bool = True, says: Tensor | None = None, apart: bool = False) -> set[str]:
    """Hold a folded checkpoint against PEFT, whole and tensor by tensor; the names on disk of the tensors that changed.

    exact   float32; else what was rounded once, to the nearest of bfloat16
    apart   whether what is one tensor in memory is several on disk
    """
    model = loaded(out)
    found = model.state_dict()
    assert set(found) == set(case.after) == set(case.before)
    moved = {name for name, tensor in case.after.items() if not torch.equal(tensor, case.before[name])}
    for name, tensor in case.after.items():
        if name not in moved:
            assert torch.equal(found[name], tensor), name
        elif exact:
            torch.testing.assert_close(found[name], tensor, **SAME_WEIGHTS)
        else:
            assert ((found[name] - tensor).abs() <= (tensor.abs() + 1e-6) * 2**-8 * 1.001).all(), name
    if exact:
        torch.testing.assert_close(logits(model, out), case.says if says is None else says, **SAME_LOGITS)
    own, was = raw(out), raw(case.base)
    assert list(own) == list(was)
    changed = {name for name in own if own[name] != was[name]}
    storages = {tensor.untyped_storage().data_ptr() for name, tensor in found.items() if name in moved}
    assert len(changed) > len(storages) if apart else len(changed) == len(storages)
    return changed


def merged_everywhere(recipe: dict[str, Any], folder: Path) -> dict[str, Tensor]:
    """The tensors of a merge, whose bits are the same in blocks and threads of two kinds and in a loaded model, and
    whose plan is the same once it was written.
    """
    for number, (threads, block) in enumerate(((1, 1 << 19), (2, 777))):
        polymerge.merge(recipe, folder / f"out{number}", threads=threads, block=block)
    assert raw(folder / "out0") == raw(folder / "out1")
    plan = polymerge.plan(recipe)
    assert polymerge.plan(plan.to_json()).hash == plan.hash
    live = LiveModel(plan)
    live.set(plan)
    found, wanted = live.model.state_dict(), loaded(folder / "out0").state_dict()
    assert all(torch.equal(found[name].float(), wanted[name].float()) for name in wanted)
    live.close()
    return dict(wanted)
