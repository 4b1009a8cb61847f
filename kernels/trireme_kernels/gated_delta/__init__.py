"""gated_delta: the gated delta rule over rows of several items, from states to states."""
