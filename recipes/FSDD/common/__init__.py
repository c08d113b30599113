"""What the recipes on strings of digits share; each links to this folder."""
