"""How good translations are, and how sure that is."""
