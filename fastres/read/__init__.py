"""The read path: joins, waits, and reading without taking."""
