"""For tests of programs that use uvsock: connected pairs, faults on the way, certificates."""

from uvsock.testing._certificates import Certificates
from uvsock.testing._faults import FaultProxy, Faults
from uvsock.testing._pair import pair, shrink_buffers

__all__ = ["Certificates", "FaultProxy", "Faults", "pair", "shrink_buffers"]
