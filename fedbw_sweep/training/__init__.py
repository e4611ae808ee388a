"""A client's local steps, the loss they minimise, and its evaluation on held-out text."""
