"""Dictionaries in other projects' files: read and written, nothing in them is ever run."""
