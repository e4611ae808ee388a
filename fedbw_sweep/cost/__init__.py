"""What a run will send and how long that takes, before it does."""
