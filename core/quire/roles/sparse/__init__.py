"""Sparse dictionaries: encoder, selectors, decoder, objective, their bookkeeping, and other projects' files."""
