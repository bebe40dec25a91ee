"""What makes the README's tables and pictures, and puts them in."""
