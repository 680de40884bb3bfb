"""The pure model: blocks, index trees, layouts, plans, errors, limits. No grpc, no asyncio, no clock, no files."""
