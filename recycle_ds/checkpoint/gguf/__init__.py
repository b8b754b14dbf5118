"""Reading GGUF files (llama.cpp)."""
