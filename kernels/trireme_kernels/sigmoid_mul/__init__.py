"""sigmoid_mul: rows times the sigmoid of a gate."""
