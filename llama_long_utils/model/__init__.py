"""A base with its RoPE, adapters on it, and the loss."""
