"""What the mechanism commands find in a real model."""
