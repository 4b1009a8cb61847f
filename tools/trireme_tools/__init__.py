"""The command line: one file a verb. Knows every room; no room knows it."""
