"""What runs in a worker: the loop, what it changes, what it measures, what it leaves at the end."""
