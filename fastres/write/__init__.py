"""The write path: results and events to their queues, confirmed by the broker."""
