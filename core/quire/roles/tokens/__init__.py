"""Sequences of tokens with positions: patches, frames, words."""

from quire.roles.tokens.contract import Layout, Segment, Subset, TokenEncoder, Tokens

__all__ = ["Layout", "Segment", "Subset", "TokenEncoder", "Tokens"]
