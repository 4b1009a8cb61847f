"""sample: one token a row of logits."""
