"""Data modules: each has an embedded source, so a run needs no network."""
