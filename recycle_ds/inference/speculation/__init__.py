"""Decisions of speculative decoding: sampling, drafts, verification, draft length, stopping."""
