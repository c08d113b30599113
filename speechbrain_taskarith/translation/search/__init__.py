"""Greedy and beam search of translations."""
