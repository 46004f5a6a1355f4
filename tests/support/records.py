"""Records of runs to report on."""

from __future__ import annotations

import json
from typing import Any

from polymerge.engine.provenance import provenance
from polymerge.families.expressions import Read
from polymerge.planning.plan import Input, LeftOut, Piece, Plan, Step
from polymerge.recipe.parameters import Setting


def plan_of(layers: int) -> Plan:
    """The plan of a VLM with an LLM of so many layers: names and shapes as LLaVA-1.5 has them."""
    ends = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj",
            "mlp.up_proj", "mlp.down_proj", "input_layernorm", "post_attention_layernorm")  # fmt: skip
    steps = [
        Step(
            f"language_model.model.layers.{layer}.{end}.weight", f"text.layers.{layer}.{end}.weight", "merged", "BF16",
            "BF16", (4096, 4096),
            pieces=(Piece(f"text.layers.{layer}.{end}.weight", ((0, 4096),), 0, (Read("x"),) * 2),),
        )
        for layer in range(layers)
        for end in ends
    ]  # fmt: skip
    steps += [
        Step(f"vision_tower.vision_model.encoder.layers.{layer}.self_attn.{end}",
             f"vision.encoder.layers.{layer}.self_attn.{end}", "copied", "BF16", "BF16", (1024, 1024),
             "part vision is not merged")
        for layer in range(24)
        for end in ("q_proj.weight", "q_proj.bias", "k_proj.weight", "k_proj.bias", "v_proj.weight", "v_proj.bias",
                    "out_proj.weight", "out_proj.bias", "fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias",
                    "layer_norm1.weight", "layer_norm1.bias", "layer_norm2.weight", "layer_norm2.bias")
    ]  # fmt: skip
    steps.append(Step("lm_head.weight", "text.lm_head.weight", "tied", "BF16", "BF16", (9, 9), same_as="embed.weight"))
    inputs = tuple(Input(label, f"owner/{label}", f"/models/{label}", "llava", 9, 9, "") for label in ("vlm", "math"))
    setting = Setting("linear", {"weight": (0.9, 0.1), "normalize": True})
    return Plan(
        recipe={"merge_method": "linear"}, inputs=inputs, template=0, models=(0, 1), places=(0, 1), base=None, seed=42,
        settings=(setting,), steps=tuple(steps), left_out=(LeftOut(1, "lm_head.weight", "its vocabulary differs"),),
        warnings=("the vocabularies differ",),
    )  # fmt: skip


def record_of(plan: Plan) -> dict[str, Any]:
    output = {"files": {"model.safetensors": 1}, "tensors": {"merged": 1}, "parameters": 1, "merged": []}
    record: dict[str, Any] = json.loads(provenance(plan, {}, ["polymerge"], output))
    return record
