"""The samples: records made into prompts and responses, token ids, and the order in which training sees them."""
