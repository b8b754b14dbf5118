"""Figures of a running server under load, as clients see them."""
