"""A file of prompts, split over processes and resumable."""
