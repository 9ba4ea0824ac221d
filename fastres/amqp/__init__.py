"""Access to the broker: connections, sessions and consumers."""
