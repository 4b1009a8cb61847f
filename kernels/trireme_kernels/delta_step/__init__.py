"""delta_step: convolution, gates, gated delta rule and gated norm for a few rows of each item, on the pools of states."""
