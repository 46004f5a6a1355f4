"""Make this folder's adapters: `python make.py FOLDER`, with the versions of PEFT and transformers that they are of.

PEFT 0.18 had the factors of parameters of experts the other way round than later ones, so the adapters are kept as it
wrote them, each with its base and with what its own `merge_and_unload` made of the two.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file

SMALL = {"vocab_size": 16, "hidden_size": 8, "intermediate_size": 6, "num_hidden_layers": 1, "num_attention_heads": 2,
         "num_key_value_heads": 1, "head_dim": 4}  # fmt: skip
BOTH = {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "qwen3_moe": ("Qwen3Moe", SMALL | {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 5}, BOTH),
    "qwen3_moe_ranks": (
        "Qwen3Moe",
        SMALL | {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 5},
        BOTH
        | {"rank_pattern": {"experts.down_proj": 4}, "alpha_pattern": {"experts.gate_up_proj": 5}, "use_rslora": True},
    ),
    "gpt_oss": (
        "GptOss",
        SMALL | {"num_local_experts": 3, "num_experts_per_tok": 2},
        BOTH,
    ),
    "gpt2": (
        "GPT2",
        {"vocab_size": 13, "n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 8, "tie_word_embeddings": False},
        {"target_modules": ["attn.c_proj", "lm_head"]},
    ),
}


def main(folder: Path) -> None:
    for name, (family, shape, given) in CASES.items():
        torch.manual_seed(0)
        made = folder / name
        head = "LMHeadModel" if family == "GPT2" else "ForCausalLM"
        model = getattr(transformers, family + head)(getattr(transformers, f"{family}Config")(**shape)).float().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn(parameter.shape) * 0.3)
        model.save_pretrained(made / "base")
        trained = get_peft_model(model, LoraConfig(r=2, lora_alpha=3, **given))
        with torch.no_grad():
            for _, parameter in sorted(trained.named_parameters()):
                if parameter.requires_grad:
                    parameter.add_(torch.randn(parameter.shape) * 0.3)
        trained.save_pretrained(made / "adapter")
        (made / "adapter" / "README.md").unlink()
        config = json.loads((made / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
        written = json.dumps(config | {"base_model_name_or_path": None}, indent=1)
        (made / "adapter" / "adapter_config.json").write_text(written, encoding="utf-8")
        merged = {name: tensor.contiguous() for name, tensor in trained.merge_and_unload().state_dict().items()}
        save_file(merged, made / "merged.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
