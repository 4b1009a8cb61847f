"""linear: rows times a weight."""
