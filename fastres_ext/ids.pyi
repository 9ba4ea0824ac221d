from fastres import _protocols

compact: _protocols.Compact
expand: _protocols.Expand
