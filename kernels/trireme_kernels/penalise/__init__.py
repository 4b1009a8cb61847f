"""penalise: repetition, presence and frequency penalties."""
