"""What people and programs get wrong, a test a row of the table in docs/errors.md."""
