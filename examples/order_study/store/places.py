"""Where everything lies in the folder of a study."""

MODELS = "models"  # base and sub-models
STEPS = "steps"  # below models and merges: states on the way, and their merges
MERGES = "merges"
RECIPES = "recipes"
LOSSES = "losses"  # what was measured of each model
RESULTS = "results.json"
REPORT = "results.md"
FIGURES = "figures"

RECORD = "made.json"  # in each folder that this program wrote: what from
ADAPTER = "adapter"  # below a sub-model: what LoRA trained
CURVE = "learning_curve.jsonl"  # in a trained model's folder: loss, learning rate and norm of the gradient of each step
