"""grouped_linear: each row times the weight of its slot."""
