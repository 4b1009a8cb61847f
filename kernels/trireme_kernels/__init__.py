"""Ops: one folder each, with a signature, a PyTorch reference that is its definition, and faster implementations where they fit."""
