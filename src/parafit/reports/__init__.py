"""How is it shown? Pages and plots."""
