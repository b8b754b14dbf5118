"""Files and folders of every format: checksums, safetensors, torch archives, tokenizer files, folders made whole or not at all."""
