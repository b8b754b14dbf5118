"""Training speed compared with Hugging Face's model of the same shape."""
