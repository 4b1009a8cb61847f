"""How a model is spread over devices, and the only code that speaks to other devices."""
