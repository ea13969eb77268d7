"""gRPC servers and clients, TLS and identities, error translation, chunked streams."""
