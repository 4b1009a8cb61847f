"""Decisions on the CPU: what runs next, on which pages, and what came of it. No torch, no server."""
