"""Texts: where they come from, and how they become training sequences."""
