"""What the hooks of an encoder share: the choice, and the passes."""
