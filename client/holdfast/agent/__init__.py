"""The host agent: the mission's calls as a gRPC service beside the VMs, and a thin client of it."""
