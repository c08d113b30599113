"""Weighted means and sums, entry by entry."""
