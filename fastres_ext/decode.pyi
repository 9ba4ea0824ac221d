from fastres import _protocols

class Decoder(_protocols.Decoder): ...

encode: _protocols.Encode
