"""How good a model is: its perplexity on a text, and how far its predictions are from another model's."""
