"""Teacher in, student cut from it: causal models and encoder-decoders of transformers."""
