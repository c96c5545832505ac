"""Every component of the core through the conformance kit."""

from quire.testing import conformance

TestConformance = conformance("core")
