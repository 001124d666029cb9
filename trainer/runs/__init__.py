"""What a run is: settings, recipes, its parts, metrics, and how it is resumed."""
