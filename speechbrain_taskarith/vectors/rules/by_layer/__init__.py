"""Rules that treat layers differently, most of them around other rules."""
