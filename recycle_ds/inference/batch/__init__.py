"""Decoding of a file of prompts, split over processes and resumable."""
