"""The terms of the translation objective."""
