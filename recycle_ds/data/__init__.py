"""Corpora, tokenizers, token files, packed samples and targets.

Import the submodules directly: some of them need torch, and command-line help must not wait for that import.
"""
