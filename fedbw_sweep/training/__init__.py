"""What happens to a model in one process: local steps and evaluation."""
