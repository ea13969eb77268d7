"""The database (one writer, one thread) and the content-addressed blob store."""
