"""Adapters outside the encoder: files, folders, and Hugging Face's hub."""
