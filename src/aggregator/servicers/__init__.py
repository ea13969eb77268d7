"""What the aggregator answers over gRPC: thin translations between messages and services."""
