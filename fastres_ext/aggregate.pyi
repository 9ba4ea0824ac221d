from fastres import _protocols

class Aggregate(_protocols.Aggregate): ...

fulfil: _protocols.Fulfil
in_order: _protocols.InOrder
listed: _protocols.Listed
