"""Blocks of a model: local arithmetic, parameters and what each keeps. No collectives, no other rank."""
