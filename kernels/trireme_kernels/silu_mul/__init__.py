"""silu_mul: the gate of a gated MLP."""
