"""How the cluster's membership heals: what nodes are told, what is decided of them, and who decides it by itself."""
