"""Vector and latent codes: the contract (re-exported here), and encoders and decoders that need no tokens."""

from quire.roles.latent.contract import (
    Classifier,
    LatentCodes,
    LatentEncoder,
    PixelDecoder,
    VectorCodes,
    VectorEncoder,
    need_vectors,
    vector_of,
)

__all__ = [
    "Classifier",
    "LatentCodes",
    "LatentEncoder",
    "PixelDecoder",
    "VectorCodes",
    "VectorEncoder",
    "need_vectors",
    "vector_of",
]
