# What a user hands in, as a pointer and a size. Inline, so that whoever takes it compiles it in.
#
# Where each write counts, exact `bytes` do not come this far: they need no Given.

from cpython.buffer cimport (
    PyBUF_INDIRECT, PyBUF_SIMPLE, PyBuffer_IsContiguous, PyBuffer_Release, PyObject_CheckBuffer,
    PyObject_GetBuffer,
)
from cpython.bytes cimport (
    PyBytes_AS_STRING, PyBytes_CheckExact, PyBytes_FromObject, PyBytes_GET_SIZE,
)
from cpython.object cimport PyObject
from cpython.unicode cimport PyUnicode_Check

cdef extern from "Python.h":
    const char* PyUnicode_AsUTF8AndSize(object text, Py_ssize_t* size) except NULL


cdef enum Accepted:
    # C-contiguous buffers; these and text, as UTF-8; buffers of any layout, as bytes() copies them.
    BUFFERS, TEXT, ANY_LAYOUT


cdef struct Given:
    const char* p
    Py_ssize_t n
    PyObject* owner       # borrowed: the bytes that these are all of, else None
    bint exported
    Py_buffer view


# Good until release(), which is due unless this raises, and while the caller has the data. It may
# run code of the user's: that of an exporter.
#
# TypeError, with the name: not what is taken. Else what the exporter raises, such as the ValueError
# of a released memoryview.
cdef inline int acquire(object data, Accepted what, str name, Given* given) except -1:
    given.owner = <PyObject*>None
    given.exported = False
    if PyBytes_CheckExact(data):
        given.owner = <PyObject*>data
        given.p = PyBytes_AS_STRING(data)
        given.n = PyBytes_GET_SIZE(data)
        return 0
    if what == TEXT and PyUnicode_Check(data):
        given.p = PyUnicode_AsUTF8AndSize(data, &given.n)
        return 0
    if not PyObject_CheckBuffer(data):
        from uvsock._options import wrong_type

        raise wrong_type(name, ("str or " if what == TEXT else "") + "a bytes-like object", data)
    # Asked for in any layout: what exporters raise for one that they do not have differs.
    PyObject_GetBuffer(data, &given.view, PyBUF_INDIRECT)
    if not PyBuffer_IsContiguous(&given.view, c"C"):
        PyBuffer_Release(&given.view)
        if what != ANY_LAYOUT:
            raise TypeError(f"{name}: must be a C-contiguous buffer")
        PyObject_GetBuffer(PyBytes_FromObject(data), &given.view, PyBUF_SIMPLE)
    given.exported = True
    given.p = <const char*>given.view.buf
    given.n = given.view.len
    return 0


cdef inline void release(Given* given) noexcept:
    if given.exported:
        PyBuffer_Release(&given.view)
