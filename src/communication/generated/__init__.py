"""Generated from proto/ by generate_grpc.sh: never edit a file here."""
