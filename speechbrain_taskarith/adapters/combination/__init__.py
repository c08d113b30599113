"""Combining adapters: means, fusion and their folded form."""
