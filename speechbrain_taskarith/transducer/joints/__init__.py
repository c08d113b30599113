"""Joint networks, and the loss that never holds their whole output."""
