"""Judges of a representation: classification with labels, probes of a frozen encoder, health without labels."""
