"""Who may do what, as pure data: permissions, roles, patterns of resources, the policy document."""
