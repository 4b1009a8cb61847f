"""rms_norm: rows divided by their root mean square."""
