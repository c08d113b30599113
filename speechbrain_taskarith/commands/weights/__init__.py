"""The verbs that subtract, add, merge and show weights."""
