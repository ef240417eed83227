"""Read and write checkpoint, tokenizer and config files; no other package knows these formats."""
