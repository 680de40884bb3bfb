"""Generated protobuf and gRPC code of Holdfast, with the `.proto` files it comes from beside it."""
