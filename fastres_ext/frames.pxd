cdef class Delivery:
    cdef public object channel_id
    cdef public object consumer_tag
    cdef public object delivery_tag
    cdef public object redelivered
    cdef public object body
    cdef public object content_type
    cdef public object content_encoding
    cdef public object correlation_id
    cdef public object compression
    cdef public object keep
