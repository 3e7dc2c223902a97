"""`mergekit-wp compare`: merges by every method, measured on the same items."""
