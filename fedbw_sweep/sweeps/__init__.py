"""The runs of a command: expanded, checked, done, shown."""
