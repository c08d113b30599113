"""MinWER and transfer from other checkpoints."""
