"""The write path: publishes results, events and tasks, with confirms."""
