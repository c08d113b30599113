"""Hugging Face's hub: names, downloads, uploads and cards."""
