"""Encoders and a recogniser that take audio in chunks."""
