"""How do many models train at once? Members of one shape are stacked along a new first dimension and run in one program."""
