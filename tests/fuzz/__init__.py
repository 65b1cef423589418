"""Random networks on random plans against one device: `python -m tests.fuzz --seed 0 --minutes 60`, or `make fuzz`."""
