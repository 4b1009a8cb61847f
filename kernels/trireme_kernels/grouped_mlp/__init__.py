"""grouped_mlp: each pair of a row and an expert through the gated MLP of its slot."""
