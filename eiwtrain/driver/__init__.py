"""What runs in the process that a user starts: checks, one attempt after another on Ray, the end of the run."""
