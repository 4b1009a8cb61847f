"""gated_rms_norm: rms_norm, then times the SiLU of a gate."""
