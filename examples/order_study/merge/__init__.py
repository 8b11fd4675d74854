"""The merges: recipes, and the stock command that makes them."""
