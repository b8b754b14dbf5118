"""Perplexity and acceptance of a trained model on any text."""
