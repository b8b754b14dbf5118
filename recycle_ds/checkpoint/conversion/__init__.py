"""Conversion between formats, with verification; inspection and comparison of folders."""
