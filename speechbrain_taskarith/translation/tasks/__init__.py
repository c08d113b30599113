"""Task weights, gradients and what is measured on them."""
