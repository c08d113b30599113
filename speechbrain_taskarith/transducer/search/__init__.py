"""Greedy and beam searches and what they extend."""
