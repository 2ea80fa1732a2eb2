"""Files that put the job on clusters."""
