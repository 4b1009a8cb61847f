"""qk_rope_write: what stands between the qkv projection and attention."""
