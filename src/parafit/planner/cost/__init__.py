"""What a program takes under a plan: seconds, bytes, and why."""
