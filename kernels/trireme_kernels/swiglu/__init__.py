"""swiglu: the gated half of an MLP."""
