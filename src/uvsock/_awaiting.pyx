"""What can be awaited, whoever made it, and the task of it."""

import asyncio
import sys

cdef bint EAGER = sys.version_info >= (3, 12)
cdef object Task = asyncio.Task

cdef extern from "Python.h":
    bint PyCoro_CheckExact(object)

cdef extern from *:
    """
    static int uvs_is_awaitable(PyObject *object) {
        PyAsyncMethods *methods = Py_TYPE(object)->tp_as_async;
        if (methods != NULL && methods->am_await != NULL)
            return 1;
        if (!PyGen_CheckExact(object))
            return 0;
        /* of a function that types.coroutine() has made one */
        PyObject *code = PyObject_GetAttrString(object, "gi_code");
        if (code == NULL)
            return -1;
        int flags = ((PyCodeObject *)code)->co_flags;
        Py_DECREF(code);
        return (flags & CO_ITERABLE_COROUTINE) != 0;
    }
    """
    bint uvs_is_awaitable(object) except -1


cdef bint is_awaitable(object result) except -1:
    """Whether ``await`` takes what a program's function returned."""
    return uvs_is_awaitable(result)


cdef object task_of(object loop, object awaitable, bint eager):
    """A task that runs in a copy of the current context; a Future is its own.

    ``eager``: where Python can it runs now, up to where it waits for something, and may be done.
    """
    if PyCoro_CheckExact(awaitable):
        if eager and EAGER and loop.get_task_factory() is None:
            return Task(awaitable, loop=loop, eager_start=True)
        return loop.create_task(awaitable)  # ensure_future() is interpreted
    return asyncio.ensure_future(awaitable, loop=loop)
