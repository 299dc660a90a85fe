"""Vision towers and the connector between tower and decoder."""
