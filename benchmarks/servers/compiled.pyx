"""What uvsock_server.py does with Python handlers, in Cython."""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from uvsock cimport Handlers, Socket


cdef class Frames(Handlers):
    cdef object on_data(self, object socket, object data):
        (<Socket>socket).write_frame_memory(PyBytes_AS_STRING(data), PyBytes_GET_SIZE(data))
