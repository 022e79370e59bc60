# Unsigned numbers as bytes. Inline, so that whoever needs them compiles them in.

cdef enum:
    # Bytes of a varint of 64 bits: seven of them each.
    UVS_VARINT_MAX = 10


cdef inline unsigned long long get_number(const char* p, Py_ssize_t width, bint little) noexcept:
    cdef unsigned long long value = 0
    cdef Py_ssize_t i
    for i in range(width):
        value = value << 8 | <unsigned char>p[width - 1 - i if little else i]
    return value


cdef inline void put_number(
    char* p, unsigned long long value, Py_ssize_t width, bint little
) noexcept:
    cdef Py_ssize_t i
    for i in range(width):
        p[i if little else width - 1 - i] = <char>(value >> (8 * i))


# The bytes of the varint at p, 0 if it is unfinished, -1 if it has more than 64 bits.
cdef inline Py_ssize_t get_varint(
    const char* p, Py_ssize_t n, unsigned long long* value
) noexcept:
    cdef unsigned long long byte
    cdef Py_ssize_t i
    value[0] = 0
    for i in range(min(n, <Py_ssize_t>UVS_VARINT_MAX)):
        byte = <unsigned char>p[i]
        if i == UVS_VARINT_MAX - 1 and byte > 1:
            return -1
        value[0] |= (byte & 0x7F) << (7 * i)
        if byte < 0x80:
            return i + 1
    return 0


# The number of bytes written, at most UVS_VARINT_MAX.
cdef inline Py_ssize_t put_varint(char* p, unsigned long long value) noexcept:
    cdef Py_ssize_t i = 0
    while value >= 0x80:
        p[i] = <char>(value & 0x7F | 0x80)
        value >>= 7
        i += 1
    p[i] = <char>value
    return i + 1
