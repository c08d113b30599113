"""The text side: encoder, local to global, decoder, noise."""
