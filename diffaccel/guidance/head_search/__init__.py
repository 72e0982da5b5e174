"""Search for the heads whose damage guides best."""
