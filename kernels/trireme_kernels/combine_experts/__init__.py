"""combine_experts: the weighted sum of a row's experts, and of the expert that every row passes."""
