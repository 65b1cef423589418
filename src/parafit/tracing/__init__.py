"""What is computed? A step as a Program: traced, never run."""
