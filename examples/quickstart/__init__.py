"""From nothing to a merged model in minutes: `train` makes base and sub-models, `compare` measures them and merges."""
