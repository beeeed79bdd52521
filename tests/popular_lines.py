"""The lines of models that most people use in late 2026, and the types of their checkpoints."""

LINES: dict[str, tuple[str, ...]] = {
    "Llama 3.x": ("llama",),
    "Qwen2.5": ("qwen2",),
    "Qwen3": ("qwen3",),
    "Qwen3-MoE": ("qwen3_moe",),
    "Qwen3.5/3.6": ("qwen3_5_text", "qwen3_5_moe_text"),
    "Qwen2.5-VL": ("qwen2_5_vl",),
    "Qwen3-VL": ("qwen3_vl",),
    "Mistral 7B, Nemo": ("mistral",),
    "Mistral Small, Ministral 3": ("mistral3", "ministral3"),
    "Gemma 2": ("gemma2",),
    "Gemma 3, 270M and 1B": ("gemma3_text",),
    "Gemma 3, 4B and up": ("gemma3",),
    "Gemma 4": ("gemma4",),
    "Phi-3, Phi-4": ("phi3",),
    "gpt-oss": ("gpt_oss",),
    "DeepSeek V3, V4": ("deepseek_v3", "deepseek_v4"),
    "R1 distillations": ("llama", "qwen2"),
    "GLM-4.x": ("glm4", "glm4_moe"),
    "SmolLM3": ("smollm3",),
    "Granite": ("granite",),
    "LFM2": ("lfm2",),
    "OLMo 2, OLMo 3": ("olmo2", "olmo3"),
}
POPULAR = sorted({kind for kinds in LINES.values() for kind in kinds})
# Those that worked when the table had rows for ten types: Llama, Mistral, Qwen2 and 3, Gemma 2 and 3, OPT, GPT-2, Phi, GPT-NeoX.
BEFORE = {
    "Llama 3.x", "Qwen2.5", "Qwen3", "Mistral 7B, Nemo", "Gemma 2", "Gemma 3, 270M and 1B", "R1 distillations",
}  # fmt: skip
