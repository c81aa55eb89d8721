"""What only makes it faster. Every function has a plain equivalent on the ground floor."""
