"""What would it take? Plans, programs, machines, prices and the search. Plain Python: neither JAX nor Keras anywhere below."""
