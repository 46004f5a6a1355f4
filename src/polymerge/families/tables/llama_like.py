"""Language models, most of which use Llama's names, and the decoders that other tables build on."""

from __future__ import annotations

from polymerge.families.rules import Family, Rule

QUERIES_KEYS_VALUES = tuple(f"self_attn.{part}_proj" for part in "qkv")
GATE_AND_UP = ("mlp.gate_proj", "mlp.up_proj")
HEAD = Rule("lm_head.weight", "text.lm_head.weight")
_LAYER = "text.layers.{i}."


def decoder(prefix: str) -> tuple[Rule, ...]:
    """The rules of a Llama-like decoder, without its head, whose embedding, layers and final norm are under `prefix`.

    They name the decoder's tensors instead of matching all of `<prefix>*`, so that a different kind of tower
    stored there is an error and not part of the text tower. All experts of a layer may be one tensor, as
    transformers 5 has them in memory.
    """
    layer, expert = prefix + "layers.{i}.", _LAYER + "mlp.experts.{e}."
    experts_in = tuple(f"{expert}{part}_proj.weight" for part in ("gate", "up"))
    return (
        Rule(prefix + "embed_tokens.weight", "text.embed_tokens.weight"),
        Rule(layer + "mlp.experts.gate_up_proj", experts_in, split="experts_in"),
        Rule(layer + "mlp.experts.down_proj", expert + "down_proj.weight", split="experts_out"),
        Rule(layer + "{rest}", _LAYER + "{rest}"),
        Rule(prefix + "norm.weight", "text.norm.weight"),
    )


def experts_apart(layer: str, expert: str, names: tuple[str, str, str]) -> tuple[Rule, ...]:
    """The rules to the published names of experts that are stored one by one, from those in memory, which are two.

    layer, expert  what the names of both begin with
    names          of an expert's gate, up and down
    """
    gate, up, down = (f"{expert}{{e}}.{name}.weight" for name in names)
    return (
        Rule(layer + "mlp.experts.gate_up_proj", (gate, up), split="experts_in"),
        Rule(layer + "mlp.experts.down_proj", down, split="experts_out"),
    )


def internlm2_decoder(prefix: str) -> tuple[Rule, ...]:
    """The rules of a decoder with InternLM2's names: a Llama whose queries, keys and values are fused head by head."""
    layer = prefix + "layers.{i}."
    names = {
        "attention.wo": "self_attn.o_proj",
        "feed_forward.w1": "mlp.gate_proj",
        "feed_forward.w2": "mlp.down_proj",
        "feed_forward.w3": "mlp.up_proj",
        "attention_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
    }
    return (
        Rule(prefix + "tok_embeddings.weight", "text.embed_tokens.weight"),
        fused(layer + "attention.wqkv", QUERIES_KEYS_VALUES, "wqkv"),
        *(Rule(f"{layer}{theirs}.{{rest}}", f"{_LAYER}{plain}.{{rest}}") for theirs, plain in names.items()),
    )


def fused(pattern: str, parts: tuple[str, ...], split: str) -> Rule:
    """The rule of a layer's tensor that holds several tensors of a plain decoder, stacked."""
    return Rule(f"{pattern}.{{rest}}", tuple(f"{_LAYER}{part}.{{rest}}" for part in parts), split=split)


LLAMA = Family(
    "llama",
    rules=(*decoder("model."), HEAD),
    model_types=("llama",),
    architectures=("LlamaForCausalLM",),
    decoders=("llama",),
    title="Llama",
    source="meta-llama/Meta-Llama-3-8B",
    defaults={"num_hidden_layers": 32, "hidden_size": 4096, "vocab_size": 32000},
)

MISTRAL = Family(
    "mistral",
    rules=LLAMA.rules,
    model_types=("mistral",),
    architectures=("MistralForCausalLM",),
    decoders=("mistral",),
    title="Mistral",
    source="mistralai/Mistral-7B-v0.1",
    defaults={"num_hidden_layers": 32, "hidden_size": 4096, "vocab_size": 32000},
)

_MIXTRAL_MOE, _MIXTRAL_EXPERT = "model.layers.{i}.block_sparse_moe.", _LAYER + "mlp.experts.{e}."

MIXTRAL = Family(
    "mixtral",
    rules=(
        Rule(_MIXTRAL_MOE + "experts.{e}.w1.weight", _MIXTRAL_EXPERT + "gate_proj.weight"),
        Rule(_MIXTRAL_MOE + "experts.{e}.w2.weight", _MIXTRAL_EXPERT + "down_proj.weight"),
        Rule(_MIXTRAL_MOE + "experts.{e}.w3.weight", _MIXTRAL_EXPERT + "up_proj.weight"),
        Rule(_MIXTRAL_MOE + "gate.weight", _LAYER + "mlp.gate.weight"),
        *LLAMA.rules,
    ),
    model_types=("mixtral",),
    architectures=("MixtralForCausalLM",),
    decoders=("mixtral",),
    title="Mixtral",
    source="mistralai/Mixtral-8x7B-v0.1",
    defaults={"num_hidden_layers": 32, "hidden_size": 4096, "vocab_size": 32000},
    published=(
        Rule("model.layers.{i}.mlp.gate.weight", _MIXTRAL_MOE + "gate.weight"),
        *experts_apart("model.layers.{i}.", _MIXTRAL_MOE + "experts.", ("w1", "w3", "w2")),
    ),
)
"""Experts are stored separately under Mixtral's names; transformers 5 calls the router `mlp.gate` in memory."""

QWEN2 = Family(
    "qwen2",
    rules=LLAMA.rules,
    model_types=("qwen2",),
    architectures=("Qwen2ForCausalLM",),
    decoders=("qwen2",),
    title="Qwen2, Qwen2.5",
    source="Qwen/Qwen2-7B",
    defaults={"num_hidden_layers": 32, "hidden_size": 4096, "vocab_size": 151936},
)
"""Queries, keys and values have biases."""

QWEN3 = Family(
    "qwen3",
    rules=LLAMA.rules,
    model_types=("qwen3",),
    architectures=("Qwen3ForCausalLM",),
    decoders=("qwen3",),
    title="Qwen3",
    source="Qwen/Qwen3-8B",
    defaults={"num_hidden_layers": 32, "hidden_size": 4096, "vocab_size": 151936},
)
"""Queries and keys have norms."""

QWEN3_MOE = Family(
    "qwen3_moe",
    rules=LLAMA.rules,
    model_types=("qwen3_moe",),
    architectures=("Qwen3MoeForCausalLM",),
    decoders=("qwen3_moe",),
    title="Qwen3 (experts)",
    source="Qwen/Qwen3-30B-A3B",
    defaults={"num_hidden_layers": 24, "hidden_size": 2048, "vocab_size": 151936},
    published=experts_apart(
        "model.layers.{i}.", "model.layers.{i}.mlp.experts.", ("gate_proj", "up_proj", "down_proj")
    ),
)
"""Experts are stored separately, `mlp.experts.0.gate_proj.weight`, or as transformers 5 has them in memory."""

GEMMA = Family(
    "gemma",
    rules=LLAMA.rules,
    model_types=("gemma",),
    architectures=("GemmaForCausalLM",),
    decoders=("gemma",),
    title="Gemma",
    source="google/gemma-2b",
    defaults={"num_hidden_layers": 28, "hidden_size": 3072, "vocab_size": 256000},
    ties=True,
)

GEMMA2 = Family(
    "gemma2",
    rules=LLAMA.rules,
    model_types=("gemma2",),
    architectures=("Gemma2ForCausalLM",),
    decoders=("gemma2",),
    title="Gemma 2",
    source="google/gemma-2-9b",
    defaults={"num_hidden_layers": 26, "hidden_size": 2304, "vocab_size": 256000},
    ties=True,
)
"""There are norms before and after the MLP."""

GEMMA3_TEXT = Family(
    "gemma3_text",
    rules=LLAMA.rules,
    model_types=("gemma3_text",),
    architectures=("Gemma3ForCausalLM",),
    decoders=("gemma3_text",),
    title="Gemma 3 (text)",
    source="google/gemma-3-1b-it",
    defaults={"num_hidden_layers": 26, "hidden_size": 2304, "vocab_size": 262208},
    ties=True,
)
"""The text-only Gemma 3, and the text tower of the others: a Gemma 2 with norms of queries and keys."""

PHI3 = Family(
    "phi3",
    rules=(
        fused("model.layers.{i}.self_attn.qkv_proj", QUERIES_KEYS_VALUES, "qkv"),
        fused("model.layers.{i}.mlp.gate_up_proj", GATE_AND_UP, "gate_up"),
        *LLAMA.rules,
    ),
    model_types=("phi3",),
    architectures=("Phi3ForCausalLM",),
    decoders=("phi3",),
    title="Phi-3, Phi-3.5",
    source="microsoft/Phi-3-mini-4k-instruct",
    defaults={"num_hidden_layers": 32, "hidden_size": 3072, "vocab_size": 32064},
)

INTERNLM2 = Family(
    "internlm2",
    rules=(
        *internlm2_decoder("model."),
        Rule("model.norm.weight", "text.norm.weight"),
        Rule("output.weight", "text.lm_head.weight"),
    ),
    model_types=("internlm2",),
    architectures=("InternLM2ForCausalLM",),
    decoders=("internlm2",),
    title="InternLM2, InternLM2.5",
    source="internlm/internlm2_5-7b-chat",
)
"""Names from a published index; how heads lie in `wqkv` from transformers' converter of InternVL."""
