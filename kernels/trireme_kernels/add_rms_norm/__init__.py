"""add_rms_norm: add to the residual, then rms_norm the rounded sum."""
