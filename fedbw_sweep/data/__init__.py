"""Text: where it comes from, what is held out of it, and how the rest is spread over clients."""
