"""Every component and config through Quire's own kit."""

from quire.testing import conformance

TestConformance = conformance("prototypes")
