"""Choosing how much of a task vector is added."""
