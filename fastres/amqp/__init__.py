"""The broker: connections to it, sessions over them, and channels with an owner."""
