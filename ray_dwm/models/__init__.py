"""nn.Modules and their presets; nothing here knows how they are distributed."""
