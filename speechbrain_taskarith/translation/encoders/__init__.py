"""Acoustic encoders, pre-trained ones among them, and a cache of their output."""
