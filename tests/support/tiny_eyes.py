"""What the published checkpoints that transformers has no class of hold beside their decoder: names and tiny shapes.

Each table has all names of one published list (tests/golden/names.json), with two blocks or as many as the list has.
"""

from __future__ import annotations

from collections.abc import Mapping

from tiny_configs import HIDDEN, TOWER

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]

WIDTH, INNER, BLOCKS = TOWER["hidden_size"], TOWER["intermediate_size"], TOWER["num_hidden_layers"]
PATCHES = 4


def linear(name: str, rows: int, columns: int) -> Shapes:
    return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}


def norm(name: str, width: int = WIDTH) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def patches(name: str) -> Shapes:
    """A convolution that looks at a patch at a time."""
    return {f"{name}.weight": (WIDTH, 3, 4, 4), f"{name}.bias": (WIDTH,)}


def under(prefix: str, *tables: Shapes) -> Shapes:
    return {prefix + name: shape for table in tables for name, shape in table.items()}


def stack(prefix: str, block: Shapes, count: int = BLOCKS) -> Shapes:
    return {f"{prefix}.{place}.{name}": shape for place in range(count) for name, shape in block.items()}


MLP = {**linear("mlp.fc1", INNER, WIDTH), **linear("mlp.fc2", WIDTH, INNER)}
NORMS = {**norm("norm1"), **norm("norm2")}
JOINED = {**linear("attn.qkv", 3 * WIDTH, WIDTH), **linear("attn.proj", WIDTH, WIDTH)}
SPLIT = {name: shape for part in ("q_proj", "k_proj", "v_proj", "out_proj")
         for name, shape in linear(f"self_attn.{part}", WIDTH, WIDTH).items()}  # fmt: skip
CLIP_BLOCK = {**SPLIT, **MLP, **norm("layer_norm1"), **norm("layer_norm2")}
CLIP_ENDS = {
    "embeddings.class_embedding": (WIDTH,),
    "embeddings.patch_embedding.weight": (WIDTH, 3, 4, 4),
    "embeddings.position_embedding.weight": (PATCHES + 1, WIDTH),
    **norm("pre_layrnorm"), **norm("post_layernorm"),
}  # fmt: skip
CLIP = {**CLIP_ENDS, **stack("encoder.layers", CLIP_BLOCK)}
SIGLIP = {
    **patches("embeddings.patch_embedding"),
    "embeddings.position_embedding.weight": (PATCHES, WIDTH),
    **stack("encoder.layers", CLIP_BLOCK),
    **norm("post_layernorm"),
}

INTERNVL = {
    "vision_model.embeddings.class_embedding": (1, 1, WIDTH),
    **patches("vision_model.embeddings.patch_embedding"),
    "vision_model.embeddings.position_embedding": (1, 4 * PATCHES + 1, WIDTH),
    **stack("vision_model.encoder.layers", {**JOINED, **MLP, **NORMS, "ls1": (WIDTH,), "ls2": (WIDTH,)}),
    # joins four patches into one
    **norm("mlp1.0", 4 * WIDTH), **linear("mlp1.1", HIDDEN, 4 * WIDTH), **linear("mlp1.3", HIDDEN, HIDDEN),
}  # fmt: skip

TWO_LAYERS = {**linear("model.mm_projector.0", HIDDEN, WIDTH), **linear("model.mm_projector.2", HIDDEN, HIDDEN)}
LLAVA = TWO_LAYERS
"""LLaVA 1.5, which does not store its vision tower."""
LLAVA_ONEVISION = {
    **TWO_LAYERS,
    **under("model.vision_tower.vision_tower.vision_model.", SIGLIP),
    "model.image_newline": (HIDDEN,),
}

QUERIES = {
    **linear("attention.query", WIDTH, WIDTH), **linear("attention.key", WIDTH, WIDTH),
    **linear("attention.value", WIDTH, WIDTH), **norm("norm1"), **norm("normk"), **norm("output.norm2"),
    **linear("output.out_proj", WIDTH, WIDTH), **linear("output.mlp.w1", INNER, WIDTH),
    **linear("output.mlp.w2", WIDTH, INNER), **linear("output.mlp.w3", INNER, WIDTH),
    **norm("output.mlp.ffn_ln", INNER),
}  # fmt: skip
OWL_BLOCK = {
    **norm("input_layernorm"), **norm("post_attention_layernorm"), **MLP,
    **linear("self_attn.query_key_value", 3 * WIDTH, WIDTH), **linear("self_attn.dense", WIDTH, WIDTH),
}  # fmt: skip
MPLUG_OWL2 = {
    "model.vision_model.embeddings.cls_token": (1, 1, WIDTH),
    "model.vision_model.embeddings.patch_embed.weight": (WIDTH, 3, 4, 4),
    "model.vision_model.embeddings.position_embedding": (1, PATCHES + 1, WIDTH),
    **norm("model.vision_model.embeddings.pre_layernorm"),
    **stack("model.vision_model.encoder.layers", OWL_BLOCK, 1),
    **norm("model.vision_model.post_layernorm"),
    **stack("model.visual_abstractor.encoder.layers", under("crossattention.", QUERIES), 1),
    "model.visual_abstractor.query_embeds": (1, 3, WIDTH),
    **linear("model.visual_abstractor.visual_fc", HIDDEN, WIDTH),
    "model.visual_abstractor.vit_eos": (1, 1, HIDDEN),
}

COG_BLOCK = {
    **norm("input_layernorm"), **norm("post_attention_layernorm"), **MLP,
    **linear("attention.query_key_value", 3 * WIDTH, WIDTH), **linear("attention.dense", WIDTH, WIDTH),
}  # fmt: skip
COGVLM = under(
    "model.vision.",
    {"boi": (1, 1, HIDDEN), "eoi": (1, 1, HIDDEN)},
    {"patch_embedding.cls_embedding": (1, WIDTH), "patch_embedding.position_embedding.weight": (PATCHES + 1, WIDTH)},
    patches("patch_embedding.proj"),
    stack("transformer.layers", COG_BLOCK),
    {"linear_proj.linear_proj.weight": (HIDDEN, WIDTH), **norm("linear_proj.norm1", HIDDEN)},
    {"linear_proj.gate_proj.weight": (48, HIDDEN), "linear_proj.dense_h_to_4h.weight": (48, HIDDEN)},
    {"linear_proj.dense_4h_to_h.weight": (HIDDEN, 48)},
)
COGVLM2 = {**COGVLM, "model.vision.conv.weight": (WIDTH, WIDTH, 2, 2), "model.vision.conv.bias": (WIDTH,)}

RESAMPLER = under(
    "resampler.",
    {"attn.in_proj_weight": (3 * HIDDEN, HIDDEN), "attn.in_proj_bias": (3 * HIDDEN,)},
    linear("attn.out_proj", HIDDEN, HIDDEN),
    {"kv_proj.weight": (HIDDEN, WIDTH), "proj": (HIDDEN, HIDDEN), "query": (PATCHES, HIDDEN)},
    *(norm(name, HIDDEN) for name in ("ln_kv", "ln_q", "ln_post")),
)
MINICPM_V = {**under("vpm.", SIGLIP), **RESAMPLER}
MINICPM_V_2 = {
    **stack("vpm.blocks", {**JOINED, **MLP, **NORMS}),
    **patches("vpm.patch_embed.proj"), **norm("vpm.norm"), "vpm.pos_embed": (1, PATCHES, WIDTH),
    **RESAMPLER, "resampler.pos_embed": (PATCHES, HIDDEN),
}  # fmt: skip

SAMPLER = {"proj_context.weight": (WIDTH, WIDTH)}
TOWERS, TRAINED = 4, 2
CAMBRIAN = {
    **TWO_LAYERS,
    **stack("model.vision_sampler_0.layers", SAMPLER, 3),
    **stack("model.vision_sampler_layers", under("layers.0.", SAMPLER)),
    **{name: shape for tower in range(TOWERS) for name, shape in under(
        f"model.mm_projector_aux_{tower}.",
        linear("0", WIDTH, WIDTH + 4 * tower), linear("2", WIDTH, WIDTH), norm("3"),
    ).items()},
    **stack("model.vision_tower_aux_list",
            {"vision_tower.vision_model.embeddings.class_embedding": (WIDTH,)}, TRAINED),
    "model.vision_query": (1, WIDTH), "model.image_newline": (HIDDEN,),
}  # fmt: skip

PHI3_V = under(
    "model.vision_embed_tokens.",
    under("img_processor.vision_model.", CLIP),
    linear("img_projection.0", HIDDEN, 4 * WIDTH),
    linear("img_projection.2", HIDDEN, HIDDEN),
    {"glb_GN": (1, 1, 4 * WIDTH), "sub_GN": (1, 1, 1, 4 * WIDTH)},
)

DEEPSEEK_VL = {
    # the projectors of its two sizes, and where their towers keep positions
    "aligner.layers.0.weight": (HIDDEN, WIDTH), "aligner.layers.2.weight": (HIDDEN, HIDDEN),
    "aligner.high_up_proj.weight": (HIDDEN // 2, WIDTH), "aligner.low_up_proj.weight": (HIDDEN // 2, WIDTH),
    "vision_model.vision_tower.pos_embed": (1, PATCHES, WIDTH),
    "vision_model.vision_tower_low.vision_tower.pos_embed": (1, PATCHES, WIDTH),
    "vision_model.vision_tower_high.vision_tower.pos_embed": (1, 2, 2, WIDTH),
}  # fmt: skip

LOOK = {name: shape for part in ("wq", "wk", "wv", "wo")
        for name, shape in linear(f"attention.{part}", WIDTH, WIDTH).items()}  # fmt: skip
MOLMO_BLOCK = {
    **LOOK, **norm("attention_norm"), **norm("ffn_norm"),
    **linear("feed_forward.w1", INNER, WIDTH), **linear("feed_forward.w2", WIDTH, INNER),
}  # fmt: skip
MOLMO = {
    "model.transformer.wte.new_embedding": (8, HIDDEN),
    **under(
        "model.vision_backbone.",
        {"image_vit.class_embedding": (WIDTH,), "image_vit.positional_embedding": (PATCHES + 1, WIDTH)},
        {"image_vit.patch_embedding.weight": (WIDTH, 3 * 4 * 4)}, norm("image_vit.pre_ln"),
        stack("image_vit.transformer.resblocks", MOLMO_BLOCK),
        # looks at two layers of the tower at once
        *(linear(f"image_pooling_2d.{part}", WIDTH, 2 * WIDTH) for part in ("wq", "wk", "wv")),
        linear("image_pooling_2d.wo", WIDTH, WIDTH),
        {"image_projector.w1.weight": (48, WIDTH), "image_projector.w2.weight": (HIDDEN, 48)},
        {"image_projector.w3.weight": (48, WIDTH), "pad_embed": (2, 2 * WIDTH)},
    ),
}  # fmt: skip
