"""Who calls and what they may do: identities, policy, the guard before every handler, and the service for both."""
