"""count_experts: how many rows each expert was given."""
