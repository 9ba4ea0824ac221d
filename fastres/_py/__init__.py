"""The reference implementation, in Python."""
