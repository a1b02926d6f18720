"""Learning an encoder from images without labels: views, methods, what watches them."""
