"""Several tasks: their gradients, weights and agreement."""
