"""Corpora, tokenizers, token files, packed samples and targets.

Callers import the modules: some of them need torch, and command-line help must not wait for it.
"""
