"""The model: connector + language model over features [I, P, Dv], never pixels, paths or strings."""
