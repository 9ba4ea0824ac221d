"""The compiled implementation."""
