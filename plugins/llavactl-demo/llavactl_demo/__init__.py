"""Two small pretrained models and a recipe for llavactl."""
