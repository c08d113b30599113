"""Sequential editing: the editor, its folder and log, the scale search."""
