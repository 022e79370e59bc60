# What becomes of a plain connection that asyncio's program has closed.

from uvsock._stream cimport LoopState


# Keep the connection behind this descriptor, which is about to be closed, as long as it matters.
cdef int keep_until_delivered(LoopState state, int fd) except -1
