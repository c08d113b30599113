"""A folder that holds a model: description and weights, read without code."""
