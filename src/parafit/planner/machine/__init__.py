"""What a plan runs on: devices, links and their measured rates."""
