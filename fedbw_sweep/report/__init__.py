"""Tables and figures from run folders; imports neither torch nor Ray nor Flower."""
