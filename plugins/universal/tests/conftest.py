"""Small built encoders and decoders with large random weights, so that argmaxes are far apart."""

from types import SimpleNamespace

import pytest
import torch

from quire.contracts import Spec, build
from quire_universal.decoder import UniversalDecoder
from quire_universal.encoder import UniversalEncoder

SPEC = {"vocab_size": 40, "length": 64, "bos": 1, "eos": 2, "pad": 0}
SMALL = {"width": 16, "heads": 2, "ffn": 32, "steps": 4, "dropout": 0.0}


def made(cls, seed=0, spec=None, std=None, **given):
    torch.manual_seed(seed)
    part = cls(**{**SMALL, **given})
    build(part, Spec({**SPEC, **(spec or {})}))
    if std is not None:
        with torch.no_grad():
            for parameter in part.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(std=std)
    return part.eval()


@pytest.fixture
def decoder():
    return lambda **given: made(UniversalDecoder, **{"std": 0.3, **given})


@pytest.fixture
def encoder():
    return lambda **given: made(UniversalEncoder, **{"std": 0.3, **given})


@pytest.fixture
def whole():
    """A stand-in for Model."""
    return lambda decoder, encoder=None: SimpleNamespace(decoder=decoder, encoder=encoder)
