"""The audit log as pure data: records, their Merkle tree, signed heads, exports and their verification."""
