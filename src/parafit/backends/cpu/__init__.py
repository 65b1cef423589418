"""What XLA:CPU needs: forms that it runs well, options, and what it holds in memory."""
