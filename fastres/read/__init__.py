"""The read path: joins, waits and looks."""
