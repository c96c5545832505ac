"""Kinds of code that several papers share."""
