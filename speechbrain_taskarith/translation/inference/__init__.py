"""A trained translator in a folder: written, loaded, used."""
