"""What the fields of transformers' configurations become in a small model: by their names, and by family."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Scale:
    """Sizes of a part of a small model."""

    width: int
    inner: int
    heads: int
    groups: int  # heads of keys and values
    head: int  # channels of a head


TEXT = Scale(width=64, inner=128, heads=4, groups=2, head=16)
TOWER = Scale(width=32, inner=64, heads=2, groups=2, head=16)  # what sees or hears, beside the decoder
WIDE_TOWER = {"granite4_vision": Scale(width=64, inner=64, heads=2, groups=2, head=32)}  # heads of 64 channels at least
VOCABULARY = 256
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
TOKEN = r".*token_(id|index)|im(age)?_(start|end|newline|patch)_id"

# parts of a configuration that describe a tower
TOWERS = r".*(vision|visual|vit|image|audio|speech|vq|qformer|codec|mimi|sam|backbone|tower|perc[ei]+v|depth|detok).*"

# Patterns of whole names -> a field of `Scale`, a number, or the most that may stay; the first that matches counts.
WIDTH = (
    r"((encoder|projector|backbone|image_text|patch_embed|merged|projection|attention|vision)_)?hidden_size|d_model"
    r"|n_embd|dim|hidden_size_global|((in|out)put_)?embedding_size|adapter_input_size|lru_width|dim_model_base"
    r"|(emb|embed|embedding|projection|ple_embed|word_embed_proj|adapter_in|vision_output|projector_(in|out)put)_dim"
)
TO_TEXT = r"out_hidden_size|text_hidden_size|adapter_out_dim|output_dim"  # a tower's, as wide as the decoder
INNER = (
    r"(dense_|ffn_)?intermediate_size(_mlp)?|d_ff|dff|dim_ff|mlp_dim|d_inner|n_inner|feed_forward_size"
    r"|((en|de)coder_)?ffn_dim|ffn_hidden_size"
)
INNER_OF_EXPERTS = (
    r"(moe|expert|shared|(moe_)?shared_experts?)_intermediate_size|expert_ffn_hidden_size|moe_hidden_size"
    r"|share_expert_dim"
)
HEADS = (
    r"(num|n)_heads?|((en|de)coder_)?attention_heads|resampler_n_heads"
    r"|num_((en|de)coder_)?attention_heads|(conf|swa)_num_attention_heads|num_sliding_attention_heads"
)
GROUPS = r"(num|swa_num|num_global)_key_value_heads|num_query_groups|num_kv_heads|kv_n_heads|num_attention_groups"
HEAD = (
    r"((swa|global|resampler|attention|index(er)?|swa_v|v|qk_nope|qk_rope)_)?head_dim|dim_head|d_head|d_kv|kv_channels"
    r"|attention_head_size|resampler_dim_head"
)
LAYERS = (
    r"(num|n)_layers?|num_hidden_layers|(en|de)coder_layers|num_((en|de)coder|global)_layers|layers|depth|num_blocks"
    r"|(conf|temporal)_num_hidden_layers|resampler_depth|num_layers_per_stack"
)
RULES: tuple[tuple[str, str | int], ...] = (
    (TO_TEXT, "text"),
    (WIDTH, "width"),
    (INNER_OF_EXPERTS, 64),
    (INNER, "inner"),
    (HEADS, "heads"),
    (HEAD, "head"),
    (r"(q|kv|o|swa_q|swa_kv)_lora_rank|laurel_rank|hc_lowrank|gated_norm_rank", 32),
    (r".*vocab_size.*|encoder_hash_byte_group_vocab", VOCABULARY),
    (r"rotary_dim|d_rel|block_multiple_of", 8),
    (r"query_pre_attn_scalar|state_size|ssm_state_size|mamba_d_state|mamba_(d_head|headdim|head_dim)", 16),
    (r"linear_((key_|value_)?head_dim)|hidden_size_per_layer_input|router_hidden_size", 16),
    (r"linear_num_value_heads|linear_num_heads|index_n_heads|upsample_groups|split_ngram_parts", 4),
    (r"linear_num_key_heads|n_mamba_heads|mamba_expand|full_attention_interval|no_rope_layer_interval", 2),
    (r"mamba_n_heads|mamba_num_heads|mamba_chunk_size", 8),
    (r"(mamba_)?n_groups|mamba_ngroups|n_group|topk_group|num_expert_group|n_layers_per_attn_res_block", 1),
    (r"mamba_dt_rank|time_step_rank", 4),
    (r"mamba_d_ssm", 128),
    (r"image_size|crop_size", 28),
    (r"patch_size", 14),
    (r"codebook_size|num_embeddings|base_channels|rel_extent|(pronunciation|shape)_embed_dim", 64),
    (r"num_centroids|num_position_embeddings", 16),
    (r"attn_layer_period|expert_layer_period|global_attn_every_n_layers|_?sliding_window_pattern|layer_group_size", 2),
    (r"attn_layer_offset|expert_layer_offset|moe_layer_start_index|num_dense_layers", 1),
    (r"num_nextn_predict_layers|num_kv_shared_layers|vocab_offset|mtp_num_hidden_layers", 0),
    (r"(ext_pw|depthwise_separable)_out_channel|nemo_conv_channels|conv_output_size", 32),
)
AT_MOST: tuple[tuple[str, str | int], ...] = (  # of what may be smaller already, or none
    (LAYERS, 2),
    (GROUPS, "groups"),
    (r"num_experts|num_local_experts|n_routed_experts|moe_num_experts|latent_query_num|num_image_tokens", 4),
    (r"mm_tokens_per_image|resampler_n_latents|num_query_tokens|prompt_length|window_size", 4),
    (r"num_experts_per_tok(en)?|moe_topk|moe_k|top_k_experts|moe_top_k|zero_expert_num|o_groups", 2),
    (r"(n|num|moe_num)_shared_experts|insert_layer_id|first_k_dense_replace", 1),
    (r"sliding_window(_size)?|attention_window_size|local_attention|attention_chunk_size|chunk_size|block_size", 8),
    (r"(lsh|local)_attn_chunk_length|additional_vocab_size|linear_chunk_size", 8),
    (r"local_attention_window_len|index_topk_blocks|centroid_intermediate_top_k", 16),
    (r"index_topk|indexer_budget|max_source_positions", 64),
    (r"(original_)?max_position_embeddings|n_positions|n_ctx|max_seq_len|model_max_length|context_length", 512),
    (r"ngram_vocab_size_base", 500),
)


class Derived:
    """In place of a value: the class derives it."""


def sections(time: int, height: int, width: int, **more: float) -> dict[str, Any]:
    """A field: rotary settings whose channels are split among time, height and width."""
    split = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [time, height, width]}
    return {"rope_parameters": split | more}


SIGHT_AND_TIME = sections(4, 2, 2)
EVERY_KIND = {key: SIGHT_AND_TIME["rope_parameters"] for key in ("full_attention", "sliding_attention")}
HYBRID: dict[str, Any] = {
    "num_hidden_layers": 4,
    "layers_block_type": ["linear_attention", "hybrid"] * 2,
    "attention_hidden_size": 128,
    "attention_head_dim": 32,
}
SHARED_KEYS: dict[str, Any] = {  # in the published models the last layers have no keys and values of their own
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2,
}
IMAGE_WORDS = {"<image>": 200, "IMGIMGA": 201, "<|visual token 000001|>": 202, "<|extra_200|>": 203}
EXPERTS = {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}

# Model type of a configuration or of a part of one -> fields that their names alone do not give.
EXCEPTIONS: dict[str, dict[str, Any]] = {
    "chameleon": {"vocabulary_map": IMAGE_WORDS},
    "cohere_compass_text": {"rope_parameters": EVERY_KIND},
    "deepseek_ocr2_text": {"num_hidden_layers": 2, "mlp_layer_types": ["dense", "sparse"]} | EXPERTS,
    "deepseek_v2": EXPERTS,
    "diffusion_gemma_text": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 64},
    "dots1": EXPERTS,
    "dots3_note_text": {
        **{"head_dim": 32, "rope_parameters": None, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 4},
        **{"swa_q_lora_rank": 32, "swa_kv_lora_rank": 32, "swa_head_dim": 32, "swa_qk_nope_head_dim": 16},
        **{"swa_v_head_dim": 16},
    },
    "emu3": {"vocabulary_map": IMAGE_WORDS},
    "ernie4_5_vl_moe_text": sections(2, 2, 4) | {"moe_intermediate_size": [64, 64]},
    "florence_vision": {"embed_dim": (16, 16, 32, 32), "num_heads": (2, 2, 2, 2), "num_groups": (2, 2, 2, 2)},
    "gemma3n_text": SHARED_KEYS
    | {"activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0], "intermediate_size": [128] * 4},
    "gemma4_text": SHARED_KEYS,
    "glm4v_text": SIGHT_AND_TIME,
    "glm4v_moe_text": sections(2, 1, 1, partial_rotary_factor=0.5),
    "glm_ocr_text": SIGHT_AND_TIME,
    "granite4_vision": {"deepstack_layer_map": [[-1, 0]], "downsample_rate": "1/2"},
    "hunyuan_vl_text": SIGHT_AND_TIME,
    "lfm2_moe": {"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"]},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "mistral4": {"rope_parameters": None, "head_dim": Derived},
    "mistral_large4_text": {"kv_source_layers": Derived},
    "molmo2_adapter": {"vision_feature_layer": [1, 0]},
    "muse_spark_audio": {"hidden_sizes": (16, 16, 32, 32)},
    "paddleocr_vl_text": SIGHT_AND_TIME,
    "qwen2_5_omni_text": SIGHT_AND_TIME,
    "qwen2_5_vl_text": SIGHT_AND_TIME,
    "qwen2_vl_text": SIGHT_AND_TIME,
    "recurrent_gemma": {"num_hidden_layers": 3},  # its kinds are a pattern of three that repeats
    "reformer": {"is_decoder": True, "axial_pos_embds": False},
    "step3p5": {"sliding_window": 8},
    "zamba": HYBRID,
    "zamba2": HYBRID | {"hybrid_layer_ids": [1, 3], "mamba_headdim": 64, "num_key_value_heads": 4, "kv_channels": 16},
}
QWEN4: dict[str, Any] = {  # the indexer of the published model, and rotary channels that fit its heads
    **{"indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 128},
    **{"indexer_budget": 2048, "indexer_compress_ratio": 4},
    **sections(11, 11, 10, partial_rotary_factor=0.25),
}
FIRST: dict[str, dict[str, Any]] = {  # what a default configuration lacks
    "dbrx": {"attn_config": {"rope_theta": 500000.0, "kv_n_heads": 8, "clip_qkv": 8}},
    "qwen4_exp": {"text_config": QWEN4},
    "qwen4_exp_text": QWEN4,
}
