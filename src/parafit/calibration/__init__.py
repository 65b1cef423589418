"""How fast is this machine? Probes, and how past predictions fared."""
