"""Files of every format: checksums, safetensors, torch archives, tokenizer files, atomic creation of folders."""
