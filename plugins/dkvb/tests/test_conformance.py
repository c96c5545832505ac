"""Every component of this plugin through Quire's conformance kit."""

from quire.testing import conformance

TestConformance = conformance("dkvb")
