cdef bint is_awaitable(object result) except -1
cdef object task_of(object loop, object awaitable, bint eager)
