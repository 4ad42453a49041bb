"""Where tokens come from: datasets, tokenizers and the input pipeline."""
