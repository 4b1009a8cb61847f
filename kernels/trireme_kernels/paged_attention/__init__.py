"""paged_attention: causal attention over keys and values in pages, for any mix of prefill and decode."""
