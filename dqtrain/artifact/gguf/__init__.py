"""A GGUF file, and llama.cpp, which runs it."""
