"""What runs leave on disk: written whole, read back typed."""
