"""The decoding engine: scheduler (pure Python), plan (integers), runner (tensors), and the loop that joins them."""
