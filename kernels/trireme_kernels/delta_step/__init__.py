"""delta_step: convolution, gates and gated delta rule for a few rows of each item, on the pools of states."""
