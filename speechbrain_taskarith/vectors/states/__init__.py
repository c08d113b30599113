"""Model states: read and write them, and tell whether two fit."""
