"""Answers: from a request to tokens, and from tokens to text and figures."""
