"""Rules on the singular values of whole matrices: TSV-M, Iso-C."""
