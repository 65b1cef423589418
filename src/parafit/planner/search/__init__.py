"""Which plan: the space, what was priced before, the ranking, and the reasons."""
