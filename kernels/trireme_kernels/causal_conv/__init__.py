"""causal_conv: SiLU of a depthwise causal convolution, over rows of several items."""
