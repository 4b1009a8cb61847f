"""pick_slots: the slot of each of a row's experts, where some have copies, and how many rows each expert was given."""
