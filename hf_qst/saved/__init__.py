"""Files: what they must hold, and the one way to write them."""
