"""A Hugging Face causal language model: how it is built, and what of it travels."""
