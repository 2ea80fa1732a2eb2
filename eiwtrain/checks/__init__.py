"""Checks of the machine, the storage, MLflow and the cluster: what `eiwtrain.doctor` runs, each in its own process."""
