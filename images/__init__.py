"""Image sets: what is known of each, and how they are made from what is published."""
