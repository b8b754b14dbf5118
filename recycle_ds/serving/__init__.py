"""An OpenAI-compatible HTTP server on the decoding engine."""
