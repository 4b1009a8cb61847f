"""sort_by_slot: pairs of a row and one of its experts, in the order of the slots that hold them."""
