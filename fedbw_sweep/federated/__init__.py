"""The federation: Flower's two apps, what travels between them, and what simulates them."""
