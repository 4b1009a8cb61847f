"""peer_sum: a sum over ranks through memory that all of them see, and with it the residual's sum and its norm."""
