"""Rules that look at lengths and angles: SLERP, Karcher, Model Stock."""
