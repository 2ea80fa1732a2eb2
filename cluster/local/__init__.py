"""`python -m cluster.local`: a small real cluster (Ray nodes, S3, MLflow) on this machine, by command and by Python."""

from cluster.local.cluster import LocalCluster
from cluster.local.ray_nodes import Node
from cluster.local.state import LocalError, down, status

__all__ = ["LocalCluster", "LocalError", "Node", "down", "status"]
