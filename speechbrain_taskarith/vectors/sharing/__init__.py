"""What goes with weights when they are handed on: cards, and the hub."""
