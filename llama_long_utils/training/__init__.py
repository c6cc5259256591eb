"""The training loop, what it costs, and what makes it cost less."""
