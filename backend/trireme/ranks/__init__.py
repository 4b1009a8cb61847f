"""Processes: a leader in the server's stub, its ranks, and what a rank does with a Step. Leaders never import torch."""
