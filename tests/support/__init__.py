"""What the tests share: models small enough to make, recipes, merges, commands, and what a merge must hold."""
