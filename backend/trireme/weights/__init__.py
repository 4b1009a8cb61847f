"""From safetensors to parameters: one loader for all families."""
