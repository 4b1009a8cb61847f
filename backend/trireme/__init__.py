"""Trireme: language models that need more than one GPU, served as models of NVIDIA Triton Inference Server."""
