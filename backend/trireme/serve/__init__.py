"""The only room that knows the server: its requests, responses, model configuration and metrics. No torch."""
