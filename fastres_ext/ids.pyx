"""Task ids as numbers, which take half the memory of the text."""

from libc.stdint cimport uint64_t

cdef extern from "Python.h":
    bint PyUnicode_IS_COMPACT_ASCII(object)
    Py_ssize_t PyUnicode_GET_LENGTH(object)
    unsigned char* PyUnicode_1BYTE_DATA(object)
    object PyUnicode_New(Py_ssize_t, Py_UCS4)
    unsigned long long PyLong_AsUnsignedLongLongMask(object) except? 0xFFFFFFFFFFFFFFFF

__all__ = ("compact", "expand")

cdef enum:
    LENGTH = 36

#: The place of each digit of a UUID in its text.
cdef unsigned char PLACES[32]
#: The value of a lower-case hexadecimal digit; 16: another character.
cdef unsigned char VALUES[256]
cdef unsigned char* DIGITS = b"0123456789abcdef"


cdef void prepare() noexcept:
    cdef int index, place = 0
    for index in range(256):
        VALUES[index] = 16
    for index in range(16):
        VALUES[DIGITS[index]] = index
    for index in range(32):
        if place == 8 or place == 13 or place == 18 or place == 23:
            place += 1
        PLACES[index] = place
        place += 1


prepare()


def compact(str id_ not None):
    """See :class:`fastres._protocols.Compact`."""
    cdef unsigned char* text
    cdef unsigned char value
    cdef uint64_t halves[2]
    cdef int index
    if not PyUnicode_IS_COMPACT_ASCII(id_) or PyUnicode_GET_LENGTH(id_) != LENGTH:
        return id_
    text = PyUnicode_1BYTE_DATA(id_)
    if text[8] != c"-" or text[13] != c"-" or text[18] != c"-" or text[23] != c"-":
        return id_
    # The variant of RFC 9562.
    if VALUES[text[19]] & 0b11100 != 0b01000:
        return id_
    halves[0] = halves[1] = 0
    for index in range(32):
        value = VALUES[text[PLACES[index]]]
        if value > 15:
            return id_
        halves[index >> 4] = halves[index >> 4] << 4 | value
    return (<object>halves[0] << 64) | halves[1]


def expand(key):
    """See :class:`fastres._protocols.Expand`."""
    cdef uint64_t halves[2]
    cdef unsigned char* text
    cdef int index
    if isinstance(key, str):
        return key
    halves[0] = PyLong_AsUnsignedLongLongMask(key >> 64)
    halves[1] = PyLong_AsUnsignedLongLongMask(key)
    id_ = PyUnicode_New(LENGTH, 127)
    text = PyUnicode_1BYTE_DATA(id_)
    text[8] = text[13] = text[18] = text[23] = c"-"
    for index in range(32):
        text[PLACES[index]] = DIGITS[halves[index >> 4] >> (60 - 4 * (index & 15)) & 15]
    return id_
