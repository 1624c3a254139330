"""One function per command: takes a recipe, returns a frozen report, prints nothing. Only ``run`` calls others."""
