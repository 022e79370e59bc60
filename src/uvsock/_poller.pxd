# Which of a loop's connections can be read or written.
#
# One descriptor per loop, of epoll's or kqueue's, holds them all and is itself watched by the loop.
# When it is ready, one callback takes a batch of them: with one wake-up of the loop's, and the GIL
# taken once.

cimport cython

# As in _poller.h, which is not named here: it is not there where a program compiles its handlers.
cdef enum:
    # What a descriptor is watched for, and what it is ready for. HANGUP is always watched for.
    UVS_WATCHED = 1
    UVS_READ = 2
    UVS_WRITE = 4
    UVS_HANGUP = 8
    # The most that one call takes.
    UVS_BATCH = 256


cdef struct Ready:
    void* who
    int what


cdef class Watched:
    # Whose descriptor a poller watches: the root of the streams.
    cdef int fd                       # -1 once it may be closed
    cdef unsigned char watching       # the bits of what it is watched for; 0: not by the poller

    # It is ready for this: bits. What is raised breaks the connection.
    cdef int on_ready(self, int what) except -1
    cdef int on_ready_raised(self, object error) except -1


@cython.final
cdef class Poller:
    cdef object loop
    cdef int fd
    cdef Py_ssize_t watched           # how many
    cdef void* only                   # the one that is watched, where there is one
    cdef object entered               # the context that the batch runs in just now
    cdef bint taking                  # a batch is being taken
    cdef int count                    # of the batch
    cdef int next
    cdef Ready batch[UVS_BATCH]

    # Watch for other bits than before; 0 ends it, and has to come before the descriptor is closed.
    cdef int watch(self, Watched who, int what) except -1
    # Within a batch: run in this context from here on.
    cdef int enter(self, object context) except -1
    cdef int leave(self) except -1
    cdef int close(self) except -1
