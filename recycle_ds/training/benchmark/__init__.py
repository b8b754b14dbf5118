"""Training speed next to Hugging Face's model of the same shape."""
