"""How does a plan run? Compiled steps and the loop around them."""
