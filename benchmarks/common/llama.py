"""Shapes of Llamas whose weights are random: what is measured does not depend on their values."""


def llama(vocab, hidden, layers, heads, intermediate, kv_heads=None, theta=10000.0) -> dict:
    """Arguments of a `LlamaConfig`."""
    return {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads or heads,
        "intermediate_size": intermediate,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
    }
