"""The whole system from outside: real processes, real files, the command line as a script would use it."""
