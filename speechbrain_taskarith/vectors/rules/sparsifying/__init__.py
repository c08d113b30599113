"""Rules that drop entries before they merge: TIES, DARE and others."""
