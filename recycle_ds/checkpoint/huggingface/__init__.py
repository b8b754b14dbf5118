"""Hugging Face folders of the LLaMA family: config.json and safetensors, with the recycle module next to them."""
