"""Small values for the fields of configurations, by the name of the field and by type."""

from __future__ import annotations

from typing import Any

LAYERS, HEADS, KV_HEADS, WIDTH = 3, 4, 2, 32
LAST = 127  # a token that the tiny models seldom generate
ENDS = ("bos_token_id", "eos_token_id", "sep_token_id", "cls_token_id", "decoder_start_token_id")


def _all(names: str, value: Any) -> dict[str, Any]:
    return dict.fromkeys(names.split(), value)


SIZES: dict[str, Any] = {
    **_all("vocab_size text_vocab_size vocab_size_per_layer_input unpadded_vocab_size decoder_vocab_size", 128),
    **_all("hidden_size d_model n_embd emb_dim embedding_size embedding_dim dim_model input_embedding_size", WIDTH),
    **_all("word_embed_proj_dim output_embedding_size attention_hidden_size lru_width embed_dim", WIDTH),
    **_all("intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim d_ff d_inner dff dim_ff n_inner", 48),
    **_all("ffn_hidden_size feed_forward_size intermediate_size_mlp dense_intermediate_size mlp_dim", 48),
    **_all("moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size", 16),
    **_all("shared_experts_intermediate_size shared_intermediate_size moe_shared_expert_intermediate_size", 16),
    **_all("num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_decoder_layers", LAYERS),
    **_all("num_encoder_layers depth num_blocks", LAYERS),
    **_all("num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads", HEADS),
    **_all("num_encoder_attention_heads num_decoder_attention_heads attention_heads swa_num_attention_heads", HEADS),
    **_all("num_key_value_heads swa_num_key_value_heads num_kv_heads", KV_HEADS),
    **_all("head_dim swa_head_dim dim_head attention_head_size d_kv d_head kv_channels v_head_dim", 8),
    **_all("max_position_embeddings n_positions n_ctx max_seq_len context_length model_max_length", 128),
    **_all("max_target_positions max_source_positions", 128),
    **_all("sliding_window sliding_window_size attention_window_size window_size local_attention", 8),
    **_all("local_attention_window_len attention_chunk_size", 8),
    **_all("kv_lora_rank", 16),
    **_all("q_lora_rank", 16),
    **_all("qk_rope_head_dim qk_nope_head_dim", 8),
    **_all("qk_head_dim", 16),
    **_all("num_experts n_routed_experts num_local_experts moe_num_experts", 4),
    **_all("num_experts_per_tok num_experts_per_token moe_k moe_topk", 2),
    **_all("n_group num_expert_group topk_group", 1),
    **_all("n_shared_experts num_shared_experts moe_num_shared_experts", 1),
    **_all("index_head_dim", 16),
    **_all("index_n_heads", 2),
    **_all("index_topk", 6),
    **_all("linear_num_key_heads linear_num_value_heads linear_num_heads", 2),
    **_all("linear_key_head_dim linear_value_head_dim linear_head_dim", 8),
    **_all("mamba_d_state state_size ssm_state_size", 8),
    **_all("mamba_n_heads mamba_num_heads n_mamba_heads", 8),
    **_all("mamba_d_head mamba_head_dim mamba_headdim", 8),
    **_all("mamba_n_groups n_groups mamba_ngroups", 1),
    **_all("mamba_dt_rank time_step_rank", 4),
    **_all("mamba_chunk_size chunk_size", 8),
    **_all("num_kv_shared_layers", 0),
    **_all("hidden_size_per_layer_input laurel_rank", 8),
    **_all("query_pre_attn_scalar", 8),
    **_all("rotary_dim", 4),
    **_all("max_window_layers", 1),
    **_all("image_size", 16),
    **_all("patch_size", 4),
    **_all("out_hidden_size projection_dim projector_hidden_size", WIDTH),
    **_all("num_position_embeddings", 16),
    **_all("first_k_dense_replace first_k_dense", 1),
    **dict.fromkeys(ENDS, LAST),
    "global_head_dim": 16,
    "pad_token_id": 0,
}
# Parts of half a head for the positions of time, height and width, of types whose configuration does not name them.
MROPE = {
    "ernie4_5_vl_moe_text": [1, 1, 2],
    "glm4v_text": [2, 1, 1],
    "glm4v_moe_text": [1, 1, 0],
    "glm_ocr_text": [2, 1, 1],
    "glmga_text": [2, 1, 1],
    "hunyuan_vl_text": [1, 1, 1, 1],
    "paddleocr_vl_text": [2, 1, 1],
    "qwen2_5_omni_text": [2, 1, 1],
    "qwen2_5_vl_text": [2, 1, 1],
    "qwen2_vl_text": [2, 1, 1],
}
TOKEN_IDS = 120  # of images, audio and so on: the last of the vocabulary

# Fields that get their small value also where the default is None, which the code of some models does not take.
ALWAYS = (
    "head_dim num_key_value_heads num_experts_per_tok n_routed_experts moe_intermediate_size n_shared_experts".split()
)

NO_INPUTS = {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}
# What the defaults of a type do not allow to be built with.
FIRST: dict[str, dict[str, Any]] = {
    "gemma4_assistant": {"text_config": NO_INPUTS},
}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
MIDDLE = {"layer_types": ["linear_attention", "full_attention", "linear_attention"]}
CONV = {"layer_types": ["conv", "full_attention", "conv"]}
SHARED = {
    "layers_block_type": ["hybrid", "mamba", "hybrid"],
    "attention_head_dim": 16,
    "attention_hidden_size": 64,
}
DECODER = {"is_decoder": True}
ASSISTANT = {  # every layer reads the cache of the model that it drafts for
    "vocab_size": 128,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": 8,
    "global_head_dim": 16,
    "layer_types": ["sliding_attention", "full_attention"],
    "num_kv_shared_layers": 2,
}
TIMM = {
    "architecture": "vit_tiny_patch16_224",
    "model_args": {"embed_dim": WIDTH, "depth": 1, "num_heads": HEADS, "img_size": 16, "patch_size": 4},
}
ENCODERS = (
    "bert bert-generation big_bird camembert data2vec-text electra ernie megatron-bert rembert roberta "
    "roberta-prelayernorm roc_bert roformer xlm-roberta xlm-roberta-xl"
).split()
BY_TYPE: dict[str, dict[str, Any]] = {
    **dict.fromkeys(ENCODERS, DECODER),
    "chameleon": {"vocabulary_map": {"<image>": TOKEN_IDS}},
    "gemma3": {"mm_tokens_per_image": 4},
    "emu3": {"vocabulary_map": {"<image>": TOKEN_IDS}},
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse", "sparse"]},
    "dots3_note_audio_encoder": {"adapter_input_size": WIDTH, "adapter_out_dim": WIDTH},
    "dots3_note_vision_encoder": {
        "adapter_in_dim": WIDTH,
        "adapter_out_dim": WIDTH,
        "mlp_layer_types": ["dense", "sparse", "sparse"],
    },
    "inkling2_vision": {"text_hidden_size": WIDTH},
    "glm5_next_text": {"index_kpool": 2, "qk_rope_head_dim": 0, "num_key_value_heads": HEADS},
    "mistral4": {"num_key_value_heads": HEADS, "head_dim": 16},  # what is rotated, and the rest
    "molmo2_adapter": {"vision_feature_layer": [2, 1], "text_hidden_size": WIDTH},
    "muse_spark_audio": {
        "patch_sizes": (2, 2, 2),
        "hidden_sizes": (8, 16, WIDTH),
        "depths": (1, 1, 1),
        "num_hidden_layers": 3,
    },
    "radio": {"video_temporal_patch_size": 2},
    "step3p5": {"sliding_window": 8},
    "unlimited_ocr_text": {"num_key_value_heads": HEADS},
    "zaya": {"num_experts_per_tok": 1},
    "bamba": {"attn_layer_indices": [1]},
    "blt": {"encoder_hash_byte_group_vocab": 64},
    "cohere_compass_text": {"rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE}},
    "dbrx": {
        "attn_config": {"kv_n_heads": KV_HEADS, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"hidden_size": WIDTH, "ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "dots3_note_text": {"num_key_value_heads": HEADS},
    "diffusion_gemma_text": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 16},
    "evolla": {"resampler_depth": 1, "aligner_num_add_layers": 2},
    "gemma4_assistant": {"text_config": {"model_type": "gemma4_text", **ASSISTANT, **NO_INPUTS}},
    "gemma4_unified_assistant": {"text_config": {"model_type": "gemma4_unified_text", **ASSISTANT}},
    **dict.fromkeys(("gemma3n_vision", "timm_wrapper"), TIMM),
    "falcon_h1": {"mamba_d_ssm": 64},
    "granite4_vision": {
        "deepstack_layer_map": [[0, 0], [1, 2]],
        "downsample_rate": "1/2",
        "spatial_target_layers": [0, 1, 2, 2],
        "vision_config": {
            "model_type": "clip_vision_model",
            "hidden_size": 64,  # as wide as a head of its projector
            "intermediate_size": 48,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "image_size": 16,
            "patch_size": 4,
        },
    },
    "granitemoehybrid": MIDDLE,
    "jamba": {"attn_layer_period": 3, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "kosmos-2.5": {"latent_query_num": 4},
    "kosmos_2_5_text_model": {"layers": LAYERS},
    "lfm2": CONV,
    "lfm2_moe": CONV,
    "mamba2": {"num_heads": 8},
    "minimax": MIDDLE,
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "reformer": {
        **DECODER,
        "attn_layers": ["local", "lsh", "local"],
        "axial_pos_shape": [8, 16],
        "axial_pos_embds_dim": [8, 24],
        "hash_seed": 0,
        "num_buckets": 2,
        "local_attn_chunk_length": 8,
        "lsh_attn_chunk_length": 8,
    },
    "xmod": {**DECODER, "default_language": "en_XX"},
    "zamba": SHARED,
    "zamba2": SHARED,
}


def per_layer(field: str, value: Any) -> Any:
    """Return a list with one item for each of the fewer layers, token ids inside the vocabulary, else the value."""
    if field.endswith(("token_id", "token_index")) and isinstance(value, int) and value >= TOKEN_IDS:
        return TOKEN_IDS + value % 7
    if field == "rope_parameters" and isinstance(value, dict) and "mrope_section" in value:
        return {**value, "mrope_section": [2, 1, 1]}  # parts of half a head
    if isinstance(value, (list, tuple)) and len(value) > LAYERS and field in PER_LAYER:
        return shortened(list(value))
    return value


PER_LAYER = (
    "layer_types mlp_layer_types indexer_types layers_block_type no_rope_layers layer_rope_theta intermediate_size "
    "num_attention_heads_per_layer activation_sparsity_pattern full_attn_idxs attention_layers moe_layers"
).split()


def shortened(values: list[Any]) -> list[Any]:
    """Return `LAYERS` items that hold as many kinds as there is room for, the last kind last."""
    kinds = list(dict.fromkeys(map(str, values)))
    first = [next(value for value in values if str(value) == kind) for kind in kinds]
    return ([first[0]] * LAYERS + first)[-LAYERS:] if len(first) <= LAYERS else first[:LAYERS]
