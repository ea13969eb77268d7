"""Schemes that sum what nobody may see: pure, without gRPC, SQL or torch; it knows only `errors`."""
