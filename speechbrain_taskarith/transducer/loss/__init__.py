"""The lattice, its transitions and the loss on full logits."""
