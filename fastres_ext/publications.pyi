from fastres import _protocols

class MessageTemplate(_protocols.MessageTemplate): ...

publication: _protocols.Publication
