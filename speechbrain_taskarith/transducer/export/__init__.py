"""A streaming recogniser as files that run without PyTorch."""
