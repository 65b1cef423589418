"""What everything may use: files, the environment, and what JAX and Keras do not document."""
